"""The lines under the table: what each row is, and what its numbers stand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.bench.gates import PASSED
from workbench.bench.metrics import LATE_SEND_S
from workbench.bench.records import Record

_SHOWN_DETAILS = ("batch_size", "max_num_seqs", "block_size", "num_threads")
_MAX_PARTS = 5


Note = tuple[str, str]
"""The number of the row it speaks of (empty: all of them), and its text."""


def footnotes(records: Sequence[Record], *, with_evidence: bool = False) -> list[Note]:
    """Return the footnotes of a table: what each row is, then what holds for all of it.

    Parameters
    ----------
    with_evidence
        Also say the evidence, for a table that has no column for it.
    """
    lines: list[Note] = []
    is_unscored = any(_reference_of(record) == "base" for record in records)
    for number, record in enumerate(records, start=1):
        parts = [
            *_what(record),
            *_checked(record, is_unscored),
            *_against(record),
            *_load(record),
            *_steady(record),
            *_objective(record),
            *_host(record),
            *_kv(record),
            *_refused_swaps(record),
        ]
        if with_evidence and record.evidence:
            found = ", ".join(f"{name} {value:,.6g}" for name, value in record.evidence.items())
            parts.append(f"evidence {found}")
        lines.append((str(number), "; ".join(parts)))
        if record.error:
            lines.append(("", f"{record.status}: {record.error}"))
    return lines + _unstable(records) + [("", line) for line in _general(records)]


def _what(record: Record) -> list[str]:
    """Version, attention, precision and the sizes that decide speed."""
    backend = record.backend
    parts: list[str] = []
    if backend:
        details = backend.get("details", {})
        shown = [f"{k.removeprefix('num_')} {details[k]}" for k in _SHOWN_DETAILS if k in details]
        parts.append(
            ", ".join(
                [
                    str(backend["version"]),
                    f"attention {backend['attention']}",
                    f"{str(backend['dtype']).removeprefix('torch.')} on {backend['device']}",
                    *(text.replace("_", " ") for text in shown),
                ]
            )
        )
    rounds = "round" if record.num_rounds == 1 else "rounds"
    parts.append(f"{record.num_rounds} {rounds}")
    return parts


def _reference_of(record: Record) -> str | None:
    """``bench.reference`` of an engine's row; other rows do not say."""
    reference: str | None = (record.resolved_config.get("bench") or {}).get("reference")
    return reference


def _checked(record: Record, is_unscored: bool) -> list[str]:
    """What a verdict stands on, where that is less than every token of an independent engine."""
    if record.verdict not in PASSED:
        return []
    parts = []
    if is_unscored:
        parts.append("checked against the engine's own base row alone")
    epsilon, ties = record.gate.get("epsilon"), record.gate.get("num_ties", 0)
    if epsilon is not None and ties:
        parts.append(
            f"{ties} of {record.gate['num_requests']} outputs part from the reference at "
            f"near-ties within {float(epsilon)} logits"
        )
    return parts


def _against(record: Record) -> list[str]:
    parts = []
    if record.speedup is not None:
        p = "" if record.p_value is None else f" (rank test p {_p(record.p_value)})"
        parts.append(f"speed-up over {record.baseline}{p}")
    if record.speedup_note:
        parts.append(record.speedup_note)
    others = {k: v for k, v in (record.compared or {}).items() if k != record.baseline}
    if others and record.kind != "baseline":
        # The smallest of the ratios is the one over the best baseline.
        name, row = min(others.items(), key=lambda item: item[1]["speedup"])
        text = f"{row['speedup']:.2f}x {name}"
        if row["ci95"]:
            text += f" [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]"
        parts.append(f"{text} ({row['word']})")
    return parts


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _load(record: Record) -> list[str]:
    """What became of an open load, and of a declared hit rate."""
    load, metrics = record.load, record.metrics or {}
    parts = []
    if load.get("target_request_s") is not None and metrics:
        late = ""
        if load["num_late_sends"]:
            late = (
                f", {load['num_late_sends']:.0f} more than {1e3 * LATE_SEND_S:.0f} ms late"
                f" (worst {1e3 * load['max_taken_late_s']:.0f} ms)"
            )
        parts.append(
            f"sent {load['sent_request_s']:.3g} of {load['target_request_s']:.3g} req/s{late}; "
            f"served {load['achieved_request_s']:.3g} req/s, {load['mean_in_flight']:.3g} in "
            f"flight on average, {load['max_in_flight']:.0f} at most; TTFT p99 "
            f"{metrics['ttft_ms']['p99']:,.0f} ms"
        )
    declared, achieved = load.get("declared_hit_rate"), load.get("hit_rate")
    if declared is not None and achieved is not None:
        parts.append(f"prefix hits {100 * achieved:.1f} % (declared {100 * declared:g} %)")
    elif achieved:
        parts.append(f"prefix hits {100 * achieved:.1f} %")
    return parts


def _steady(record: Record) -> list[str]:
    if record.steady is None:
        return []
    speed = record.steady["metrics"]["output_tok_s"]["value"]
    share = record.steady["share"]
    if speed is None:
        return []
    return [f"steady window {100 * share:.0f} % of the run, {speed:,.4g} tok/s in it"]


def _objective(record: Record) -> list[str]:
    """The bounds, and the share of requests that met each."""
    if record.slo is None:
        return []
    names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E"}
    parts = []
    for key, bound in record.slo["bounds"].items():
        share = record.slo["share_met_by"][key]
        met = "" if share is None else f" met by {100 * share:.1f} %"
        parts.append(f"{names[key]} up to {bound:g} ms{met}")
    return ["objective " + ", ".join(parts)]


def _host(record: Record) -> list[str]:
    """Host time a step, with its largest parts."""
    counters = record.counters
    if "host_us_per_step" not in counters or record.metrics is None:
        return []
    prefix = "us_per_step."
    split = {k.removeprefix(prefix): v for k, v in counters.items() if k.startswith(prefix)}
    largest = sorted(split.items(), key=lambda item: -item[1])[:_MAX_PARTS]
    text = f"host {counters['host_us_per_step']:.0f} µs a step"
    if "host_us_median_step" in counters:
        text += f", median {counters['host_us_median_step']:.0f}"
    if largest:
        text += "; mean of parts: " + ", ".join(f"{name} {value:.0f}" for name, value in largest)
    return [text]


def _kv(record: Record) -> list[str]:
    """Share of the reserved KV that no token used, and how near the prediction came."""
    memory = record.memory or {}
    if record.metrics is None:
        return []
    parts = []
    allocated, used = memory.get("kv_allocated_tokens", 0), memory.get("kv_used_tokens", 0)
    if allocated:
        text = f"KV waste {100 * (1 - used / allocated):.1f} % at its fullest"
        if memory.get("kv_mean_waste") is not None:
            text += f", {100 * memory['kv_mean_waste']:.1f} % on average"
        parts.append(text)
    predicted = sum((memory.get("predicted") or {}).values())
    if predicted:
        share = 100 * memory["peak_memory_bytes"] / predicted
        parts.append(f"peak memory {share:.0f} % of the ledger's prediction")
    device = memory.get("device")
    if device:
        whole = sum(device.values())
        parts.append(
            f"{100 * (1 - device['free'] / whole):.0f} % of the device in use ({whole / 2**30:.1f} "
            f"GiB), {100 * device['kv_pool'] / whole:.0f} % KV, "
            f"{100 * device['unexplained'] / whole:.1f} % unexplained"
        )
    return parts


def _refused_swaps(record: Record) -> list[str]:
    """Pre-empted requests that a host tier was asked to take, and had no room for."""
    refused = record.counters.get("scheduler.swaps_refused", 0)
    if not refused:
        return []
    return [
        f"the host had no room for the KV of {refused:,.0f} of "
        f"{record.counters['scheduler.preemptions']:,.0f} pre-empted requests: computed again"
    ]


def _general(records: Sequence[Record]) -> list[str]:
    """What holds for the whole table."""
    lines: list[str] = []
    measured = [record for record in records if record.metrics is not None]
    if measured:
        lines.append(
            "Medians over rounds of the same requests, variants alternated, ramp and drain "
            "included unless a note says steady; TTFT counts from the request's release, so it "
            "includes queueing."
        )
    if any(record.load.get("target_request_s") is not None for record in measured):
        lines.append(
            "An open load: requests are released at their times, however late the backend takes "
            "them, and latency counts from there. The arrivals set the rate, so compare latency "
            "and goodput; output tok/s differ only where a row did not keep up."
        )
    ceilings: dict[str, Any] = next((r.ceilings for r in records if r.ceilings), {}) or {}
    shares = [r.roofline["mbu"] for r in measured if r.roofline and r.roofline.get("mbu")]
    if ceilings and shares:
        best = max(ceilings["copy_bytes_s"], ceilings["read_bytes_s"])
        line = f"MBU: of {best / 1e9:,.1f} GB/s measured here"
        if any(r.roofline["basis"] == "wall time" for r in measured if r.roofline):
            line += "; over wall time where a backend does not tell its model time"
        if max(shares) > 1:
            line += ". Above 100 %: the ceiling was measured on a busy machine, measure it again"
        lines.append(line + ".")
    if any(record.verdict in ("FAILED", "INVALID") for record in records):
        lines.append("FAILED or INVALID rows have no speed: a number needs a passed check.")
    return lines


def _unstable(records: Sequence[Record]) -> list[Note]:
    """Name the counts that were not the same in every round."""
    lines = []
    for number, record in enumerate(records, start=1):
        names = sorted(record.unstable_counters)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            is_open = record.load.get("target_request_s") is not None
            why = (
                "arrivals by the clock decide what runs together"
                if is_open
                else "it does not run deterministically"
            )
            lines.append(
                (
                    str(number),
                    f"counts differ between rounds: {', '.join(names[:3])}{more}; {why}.",
                )
            )
    return lines
