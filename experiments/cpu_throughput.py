"""How much faster than Transformers is the engine on this CPU, at batch 1, 8, 32 and mixed lengths?

    python -m experiments.cpu_throughput [models_dir=...] [results_dir=results]

Every case runs the engine and the rungs of Transformers in the same process, in turn, over the
same requests, and writes one record a variant. The last table holds the engine against the best
rung of its own run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure
from workbench.core.errors import WorkbenchError


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


def best_rung(records: Sequence[Record]) -> Record | None:
    """The baseline with the highest output tok/s."""
    rungs = [r for r in records if r.kind == "baseline" and r.metrics]
    return max(rungs, key=_speed, default=None)


def _speed(record: Record) -> float:
    assert record.metrics is not None
    return float(record.metrics["output_tok_s"]["value"])


def main(arguments: Sequence[str]) -> int:
    """Run the cases whose names are given with ``only=``, or all."""
    only = [text.removeprefix("only=") for text in arguments if text.startswith("only=")]
    rest = [text for text in arguments if not text.startswith("only=")]
    console = Console(width=None if sys.stdout.isatty() else 120)
    summary = Table(title="engine against the best rung of Transformers in the same run")
    for column in ("case", "best rung", "its tok/s", "engine tok/s", "ratio", "95 %", "target"):
        summary.add_column(column)
    passed = True
    for case in CASES:
        if only and case.name not in only:
            continue
        results = measure([*case.overrides, *rest])
        print_table(results, console)
        records = [r.record for r in results]
        engine = next(r for r in records if r.kind == "engine")
        rung = best_rung(records)
        if rung is None or engine.metrics is None or engine.compared is None:
            summary.add_row(case.name, "-", "-", engine.verdict, "-", "-", f"{case.target}x")
            passed = False
            continue
        compared = engine.compared[rung.variant]
        passed &= compared["speedup"] >= case.target
        interval = compared["ci95"]
        summary.add_row(
            case.name,
            rung.variant,
            f"{_speed(rung):.1f}",
            f"{_speed(engine):.1f}",
            f"{compared['speedup']:.2f}x",
            f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "-",
            f"{case.target}x",
        )
    console.print(summary)
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except WorkbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
