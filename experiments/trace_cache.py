"""What do prefix caches find in real traffic, by the size of the pool and the order of eviction?

    python -m experiments.trace_cache data_dir=DIR [results_dir=results]

Mooncake traces (their ``hash_ids`` say what prompts share) and Azure traces (lengths and times
alone) go through the scheduler, the KV manager and the caches without a model: every request at
its recorded lengths, arriving at its recorded time, where a step takes ``step_ms`` of the trace's
time whatever is in it. So what is told are counts, not speeds.

- **Mooncake**: blocks of 512 tokens, the traces' own; a prompt runs in one step, and requests that
  arrive together go one a step, so that a pool without bounds must find exactly what the trace
  holds. The program checks that it does. Pools are shares of the trace's distinct blocks.
- **Azure**: no two prompts are known to share anything, so hit rates are 0 by construction. What
  is measured is scheduling: blocks of 16 tokens, chunks of 512 tokens a step, pools as multiples
  of the KV that runs on average where nothing has to wait, for each admission.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from experiments import command, figures
from experiments.dry import DryRecorder, check_overrides, count
from experiments.traces import OUTPUT_ID, Trace, find_traces, read_trace
from workbench.assemble import Limits, build_scheduler
from workbench.bench.records import Record
from workbench.configuration import Composed, compose_config, options_of
from workbench.core.errors import ConfigError
from workbench.simulate.dry_run import DryRun, DryRunner, DryRunResult


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    data_dir
        Folder that holds the traces, at any depth.
    limit
        First so many requests of each trace; 0 for all.
    caches
        Options of slot ``prefix_cache``.
    evictions
        Options of slot ``eviction``, for pools that are too small for everything.
    pools
        Mooncake: shares of the trace's distinct blocks; ``inf`` for a pool without bounds.
    pool_factors
        Azure: multiples of the KV that runs on average.
    admissions
        Azure: options of slot ``admission``; all by default.
    step_ms
        The trace's milliseconds that go by in a step.
    check_every
        Check all books every so many steps; 0 at the end of each run.
    """

    data_dir: str = ""
    traces: tuple[str, ...] = (
        "mooncake_conversation",
        "mooncake_synthetic",
        "azure_code",
        "azure_conversation",
    )
    limit: int = 0
    caches: tuple[str, ...] = ("block_hash", "radix")
    evictions: tuple[str, ...] = ("lru", "lfu", "fifo")
    pools: tuple[float, ...] = (0.01, 0.05, 0.25, math.inf)
    pool_factors: tuple[float, ...] = (1.0, 2.0, math.inf)
    admissions: tuple[str, ...] = ("all",)
    step_ms: float = 20.0
    check_every: int = 0

    def __post_init__(self) -> None:
        for name, values in (("pools", self.pools), ("pool_factors", self.pool_factors)):
            if not values or min(values) <= 0:
                raise ConfigError(f"{name}={values} must be numbers over 0, or inf.")
        if self.step_ms <= 0 or self.limit < 0:
            raise ConfigError("step_ms must be over 0, and limit 0 (all) or more.")

    @property
    def admission_options(self) -> tuple[str, ...]:
        """Those asked for, or all that there are, the null object first."""
        if self.admissions != ("all",):
            return self.admissions
        known = options_of("engine/admission")
        return tuple(sorted(known, key=lambda name: (name != "reserve_full", name)))


@dataclass(slots=True)
class Bench:
    """What all runs share."""

    options: Options
    overrides: Sequence[str]
    recorder: DryRecorder

    def serve(
        self,
        variant: str,
        trace: Trace,
        overrides: Sequence[str],
        pool_tokens: int,
        more: dict[str, float],
    ) -> Record:
        """Replay a trace once, and record it."""
        composed = compose_config(["+experiment=trace_cache", *overrides, *self.overrides])
        limits = limits_for(composed, trace, pool_tokens)
        scheduler = build_scheduler(composed.components, limits)
        run = DryRun(
            scheduler,
            DryRunner(OUTPUT_ID),
            max_arrivals_per_step=1 if trace.shares_prefixes else None,
            check_every=self.options.check_every,
        )
        result = run.serve(trace.arrivals(self.options.step_ms / 1000))
        check_outputs(trace, result)
        return self.recorder.add(
            variant,
            result,
            composed,
            limits,
            {"name": trace.name, "num_requests": len(trace.requests), "limit": self.options.limit},
            {"name": "trace", "step_ms": self.options.step_ms},
            {"pool_tokens": limits.kv_pool_tokens, **more},
        )


def limits_for(composed: Composed, trace: Trace, pool_tokens: int) -> Limits:
    """Limits that hold the trace's longest request; a pool is never smaller than that one."""
    block_size = composed.components["kv_cache"]["block_size"]
    longest = -(-trace.longest // block_size) * block_size
    return Limits(
        max_num_seqs=int(composed.cfg.limits.max_num_seqs),
        max_model_len=longest,
        kv_pool_tokens=max(pool_tokens, longest),
    )


def check_outputs(trace: Trace, result: DryRunResult) -> None:
    """Every request ended with all its tokens."""
    produced = [line.num_output_tokens for line in result.timelines.values()]
    assert produced == [row.output_len for row in trace.requests], "output tokens went missing"


# -- traces that say what prompts share ---------------------------------------------------------


def replay_mooncake(bench: Bench, trace: Trace) -> list[Record]:
    """Every cache, order of eviction and pool; the pool without bounds is checked."""
    block_size = trace.requests[0].block_tokens
    findable, num_distinct = trace.whole_block_hits()
    recorded, num_recorded = trace.recorded_hits()
    known = {
        "infinite_hit_blocks": findable,
        "infinite_recorded_hit_blocks": recorded,
        "recorded_blocks": num_recorded,
        "distinct_blocks": num_distinct,
    }
    base = [
        f"engine.kv_cache.block_size={block_size}",
        f"engine.scheduler.max_num_batched_tokens={1 << 40}",
    ]
    records = []
    for cache in bench.options.caches:
        for pool in bench.options.pools:
            is_endless = math.isinf(pool)
            # An order of eviction decides nothing where nothing is evicted.
            for eviction in bench.options.evictions[: 1 if is_endless else None]:
                blocks = trace.num_blocks(block_size) if is_endless else int(pool * num_distinct)
                chosen = [f"engine/prefix_cache={cache}", f"engine/eviction={eviction}"]
                name = variant_of(cache, eviction, pool)
                more = {**known, "pool_share": pool}
                record = bench.serve(name, trace, [*base, *chosen], blocks * block_size, more)
                if is_endless:
                    check_endless(record, findable, block_size)
                records.append(record)
    return records


def variant_of(cache: str, eviction: str, pool: float) -> str:
    """Name of a row."""
    return f"{cache}, unbounded" if math.isinf(pool) else f"{cache}, {eviction}, {100 * pool:g} %"


def check_endless(record: Record, findable: int, block_size: int) -> None:
    """A pool without bounds finds all there is to find, and evicts nothing."""
    found = count(record, "cached_tokens") / block_size
    if found != findable or record.counters["prefix_cache.evicted_blocks"]:
        raise AssertionError(
            f"{record.variant}: {found:g} blocks found in a pool without bounds, where the trace "
            f"has {findable} to find"
        )


def mooncake_table(records: Sequence[Record], trace: Trace) -> Table:
    """Hit rates of one trace."""
    recorded, total = trace.recorded_hits()
    findable, _ = trace.whole_block_hits()
    table = command.new_table(
        f"{trace.name}: {len(trace.requests)} requests; {100 * recorded / total:.1f} % of the "
        f"blocks were seen before, {100 * findable / total:.2f} % are whole and leave a token to "
        "run",
        "cache, eviction, pool",
        "hit %",
        "of findable %",
        "evicted blocks",
        "wait p99, steps",
        "schedule() us",
        "p99",
    )
    for record in records:
        hits = hit_blocks(record)
        table.add_row(
            record.variant,
            f"{100 * hits / total:.2f}",
            f"{100 * hits / findable:.1f}" if findable else "-",
            f"{record.counters['prefix_cache.evicted_blocks']:.0f}",
            f"{count(record, 'p99_waited_steps'):.0f}",
            f"{count(record, 'schedule_us_median'):.0f}",
            f"{count(record, 'schedule_us_p99'):.0f}",
        )
    return table


def hit_blocks(record: Record) -> float:
    """Blocks that came from the cache."""
    block_size: int = record.resolved_config["engine"]["kv_cache"]["block_size"]
    return count(record, "cached_tokens") / block_size


def draw_mooncake(results: dict[Trace, list[Record]], bench: Bench) -> Path:
    """Hit rate over the size of the pool, a panel a trace."""
    options, first = bench.options, next(iter(results.values()))
    title = figures.title_of("prefix hits in recorded traces (counted, no model)", first)
    figure, panels = figures.new_figure(title, len(results))
    for axes, (trace, records) in zip(panels, results.items(), strict=True):
        recorded, total = trace.recorded_hits()
        sizes = sorted(options.pools)
        places = {size: place for place, size in enumerate(sizes)}
        for cache in options.caches:
            for eviction in options.evictions:
                found = [
                    (places[size], 100 * hit_blocks(record) / total)
                    for size in sizes
                    for record in records
                    if record.variant == variant_of(cache, eviction, size)
                ]
                axes.plot(
                    *zip(*found, strict=True),
                    color=figures.colour(options.evictions.index(eviction)),
                    ls=figures.line(options.caches.index(cache)),
                    marker=figures.marker(options.caches.index(cache)),
                    mfc="none",
                    label=f"{cache}, {eviction}",
                )
        axes.axhline(100 * recorded / total, color="black", lw=1.0, ls=":")
        axes.annotate(
            f"endless cache: {100 * recorded / total:.1f} %",
            (0, 100 * recorded / total),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
        axes.set_xticks(
            range(len(sizes)), ["unbounded" if math.isinf(s) else f"{100 * s:g} %" for s in sizes]
        )
        axes.set_xlabel("pool, share of the trace's distinct blocks")
        axes.set_ylabel("blocks found in the cache, %")
        axes.set_ylim(0, 110 * recorded / total if recorded else 1)
        axes.set_title(f"{trace.name}, {len(trace.requests)} requests", fontsize=9, loc="left")
        figures.legend(axes, loc="lower right")
    assert bench.recorder.file is not None
    return figures.save(figure, bench.recorder.file, "trace_cache", bench.recorder.run_id)


# -- traces of lengths and times ----------------------------------------------------------------


def replay_azure(bench: Bench, trace: Trace) -> list[Record]:
    """Every cache and pool, and every admission, after one run that finds out what runs on average.

    The caches differ in nothing but their own cost here, so the second admission and those after
    it go with the first cache alone, in the pools that have bounds.
    """
    options = bench.options
    base = ["engine/prefill=chunked", "engine.prefill.chunk_tokens=512", "limits.max_num_seqs=512"]
    composed = compose_config(["+experiment=trace_cache", *bench.overrides])
    block_size = int(composed.components["kv_cache"]["block_size"])
    endless = trace.num_blocks(block_size) * block_size
    free = bench.serve("no cache, unbounded", trace, base, endless, {})
    demand = count(free, "mean_kv_used_tokens")
    records = [free]
    for cache, admission, factor in itertools.product(
        options.caches, options.admission_options, options.pool_factors
    ):
        is_first = cache == options.caches[0], admission == options.admission_options[0]
        if not is_first[1] and (math.isinf(factor) or not is_first[0]):
            continue
        tokens = endless if math.isinf(factor) else int(factor * demand)
        chosen = [
            f"engine/prefix_cache={cache}",
            "engine/eviction=lru",
            f"engine/admission={admission}",
        ]
        more = {"pool_factor": factor, "mean_demand_tokens": demand}
        name = azure_variant(cache, admission, factor)
        record = bench.serve(name, trace, [*base, *chosen], tokens, more)
        if count(record, "cached_tokens"):
            raise AssertionError(f"{name}: prompts that share nothing had a hit")
        records.append(record)
    return records


def azure_variant(cache: str, admission: str, factor: float) -> str:
    """Name of a row."""
    size = "unbounded" if math.isinf(factor) else f"{factor:g}x"
    return f"{cache}, {admission}, {size}"


def azure_table(records: Sequence[Record], trace: Trace) -> Table:
    """Waits, waste and pre-emptions of one trace."""
    table = command.new_table(
        f"{trace.name}: {len(trace.requests)} requests, no known prefixes (hit rate 0); pools "
        "relative to the KV that runs on average",
        "cache, admission, pool",
        "pool tokens",
        "wait, steps",
        "p99",
        "waste %",
        "pre-empted",
        "schedule us",
        "p99",
    )
    for record in records:
        table.add_row(
            record.variant,
            f"{count(record, 'pool_tokens'):,.0f}",
            f"{count(record, 'mean_waited_steps'):.1f}",
            f"{count(record, 'p99_waited_steps'):.0f}",
            f"{100 * count(record, 'mean_kv_waste'):.2f}",
            f"{record.counters['scheduler.preemptions']:.0f}",
            f"{count(record, 'schedule_us_median'):.0f}",
            f"{count(record, 'schedule_us_p99'):.0f}",
        )
    return table


def draw_azure(results: dict[Trace, list[Record]], bench: Bench) -> Path:
    """Waiting time by pool and admission, a panel a trace."""
    options, first = bench.options, next(iter(results.values()))
    title = figures.title_of("scheduling of recorded traces (counted, no model)", first)
    figure, panels = figures.new_figure(title, len(results))
    for axes, (trace, records) in zip(panels, results.items(), strict=True):
        sizes = sorted(options.pool_factors)
        by_name = {record.variant: record for record in records}
        for number, admission in enumerate(options.admission_options):

            def of_size(size: float, admission: str = admission) -> str:
                # Without bounds all admissions are one.
                return options.admission_options[0] if math.isinf(size) else admission

            for kind, name in enumerate(("mean_waited_steps", "p99_waited_steps")):
                found = [
                    count(by_name[azure_variant(options.caches[0], of_size(size), size)], name)
                    for size in sizes
                ]
                axes.plot(
                    [value * options.step_ms / 1000 for value in found],
                    color=figures.colour(number),
                    ls=figures.line(kind),
                    marker=figures.marker(number),
                    mfc="none",
                    label=f"{admission}, {'99th percentile' if kind else 'mean'}",
                )
        axes.set_xticks(
            range(len(sizes)), ["unbounded" if math.isinf(s) else f"{s:g}x" for s in sizes]
        )
        axes.set_xlabel("pool, multiples of the KV that runs on average")
        axes.set_ylabel(f"wait, s of the trace's time ({options.step_ms:g} ms a step)")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(0, 2 * axes.get_ylim()[1])
        axes.set_title(f"{trace.name}, {len(trace.requests)} requests", fontsize=9, loc="left")
        figures.legend(axes)
    assert bench.recorder.file is not None
    return figures.save(figure, bench.recorder.file, "trace_scheduling", bench.recorder.run_id)


def main(arguments: Sequence[str]) -> int:
    """Replay the traces, write records and figures, print the tables."""
    options, overrides = command.parse(Options, arguments)
    varied = {"prefix_cache": "caches", "eviction": "evictions", "admission": "admissions"}
    check_overrides(overrides, Options, ("limits.max_num_seqs", "results_dir"), varied)
    files = find_traces(options.data_dir, options.traces)
    composed = compose_config(["+experiment=trace_cache", *overrides])
    recorder = DryRecorder(
        str(composed.cfg.results_dir), command.command_line("trace_cache", arguments)
    )
    bench = Bench(options, overrides, recorder)
    shared: dict[Trace, list[Record]] = {}
    timed: dict[Trace, list[Record]] = {}
    tables = []
    for name, path in files.items():
        trace = read_trace(name, path, options.limit)
        if trace.shares_prefixes:
            shared[trace] = replay_mooncake(bench, trace)
            tables.append(mooncake_table(shared[trace], trace))
        else:
            timed[trace] = replay_azure(bench, trace)
            tables.append(azure_table(timed[trace], trace))
    drawn = [draw_mooncake(shared, bench)] if shared else []
    drawn += [draw_azure(timed, bench)] if timed else []
    command.show(*tables, f"records: {recorder.file}", *(f"figure:  {path}" for path in drawn))
    return 0


if __name__ == "__main__":
    command.run(main)
