"""How much faster than Transformers is the engine on this CPU, at batch 1, 8, 32 and mixed lengths?

    python -m experiments.cpu_throughput [models_dir=...] [results_dir=results]

Every case runs the engine and the rungs of Transformers in the same process, in turn, over the
same requests, and writes one record a variant and a figure. The last table holds the engine against
the best rung of its own run. The exit status is 0 only where every row passed its gates and every
target was reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from experiments import command, rows
from workbench.bench.figure import draw, figure_path
from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure
from workbench.core.errors import unknown_name


@dataclass(frozen=True, slots=True)
class Case:
    """One load.

    Attributes
    ----------
    target
        Output tok/s over the best rung's that the project asks of itself.
    """

    name: str
    overrides: tuple[str, ...]
    target: float


_FIXED = "+experiment=cpu_throughput"


def _rungs(*more: str) -> str:
    """The best static batch, and the rung that could beat it at this load."""
    return f"baselines=[{','.join([*more, 'hf_static_batch_best'])}]"


CASES = (
    Case("batch 1", (_FIXED, "workload.num_requests=2", "load=closed", _rungs("hf_naive")), 1.6),
    Case("batch 8", (_FIXED, "workload.num_requests=8", _rungs()), 1.8),
    Case("32 mixed lengths", (_FIXED, "workload=mixed", _rungs("hf_continuous_batching")), 2.5),
    Case("batch 32", (_FIXED, "workload.num_requests=32", _rungs()), 2.2),
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    only
        Names of cases; all by default.
    """

    only: tuple[str, ...] = ("all",)

    def cases(self) -> list[Case]:
        """Those asked for, in the order of ``CASES``."""
        if self.only == ("all",):
            return list(CASES)
        known = [case.name for case in CASES]
        for name in self.only:
            if name not in known:
                raise unknown_name("case", name, known)
        return [case for case in CASES if case.name in self.only]


def best_rung(records: Sequence[Record]) -> Record | None:
    """The baseline with the highest output tok/s."""
    rungs = [r for r in records if r.kind == "baseline" and r.metrics]
    return max(rungs, key=lambda rung: rows.value(rung, "output_tok_s"), default=None)


def add_case(table: Table, case: Case, records: Sequence[Record]) -> bool:
    """Add a row a case, and one for each of its rows without a speed; whether all is well."""
    failed = [record for record in records if not record.is_passed]
    engine = next(r for r in records if r.kind == "engine")
    rung = best_rung(records)
    compared = (engine.compared or {}).get(rung.variant) if rung else None
    target = f"{case.target}x"
    if rung is None or compared is None or engine.metrics is None:
        table.add_row(case.name, rung.variant if rung else "-", "-", "-", "-", "-", target)
    else:
        interval = compared["ci95"]
        table.add_row(
            case.name,
            rung.variant,
            f"{rows.value(rung, 'output_tok_s'):.1f}",
            f"{rows.value(engine, 'output_tok_s'):.1f}",
            f"{compared['speedup']:.2f}x",
            f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "-",
            target,
        )
    for record in failed:
        table.add_row("", f"{record.variant}: {record.verdict}", *["-"] * 5)
    return not failed and compared is not None and compared["speedup"] >= case.target


def main(arguments: Sequence[str]) -> int:
    """Run the cases, write records and figures, print the tables."""
    options, rest = command.parse(Options, arguments)
    line = command.command_line("cpu_throughput", arguments)
    summary = command.new_table(
        "engine against the best rung of Transformers in the same run",
        *("case", "best rung", "its tok/s", "engine tok/s", "ratio", "95 %", "target"),
    )
    is_well = True
    paths = []
    for case in options.cases():
        results = measure([*case.overrides, *rest], command=line)
        print_table(results, command.console())
        records = rows.records_of(results)
        file = rows.file_of(results)
        paths += [
            f"records: {file}",
            f"figure:  {draw(results, figure_path(file, records[0].run_id))}",
        ]
        is_well &= add_case(summary, case, records)
    command.show(summary, *dict.fromkeys(paths))
    return 0 if is_well else 1


if __name__ == "__main__":
    command.run(main)
