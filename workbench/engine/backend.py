"""The engine behind the bench's ``Backend`` protocol."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from workbench import __version__
from workbench.core.backend import BackendInfo, MemoryLedger, RequestSource, TokenEvent
from workbench.core.errors import RequestError
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord
from workbench.engine.engine import Engine


class EngineBackend:
    """Serves a workload with an :class:`Engine`.

    Parameters
    ----------
    name
        What the row is called.
    engine
        Assembled and idle.
    info
        Attention, precision, device and what else tells the row apart.
    keeps_cache
        Leave cached prefixes of one run to the next; else each run starts cold.
    """

    def __init__(
        self, name: str, engine: Engine, info: dict[str, Any], *, keeps_cache: bool = False
    ) -> None:
        self.name = name
        self.engine = engine
        self._info = info
        self._keeps_cache = keeps_cache

    def info(self) -> BackendInfo:
        details = {k: v for k, v in self._info.items() if k not in ("attention", "dtype", "device")}
        return BackendInfo(
            name=self.name,
            version=f"workbench {__version__}, torch {torch.__version__}",
            attention=self._info["attention"],
            dtype=self._info["dtype"],
            device=self._info["device"],
            details=details,
        )

    def run(self, source: RequestSource, on_event: Callable[[TokenEvent], None]) -> None:
        """Serve the source to its end (see :class:`workbench.core.backend.Backend`)."""
        engine = self.engine
        if not self._keeps_cache:
            engine.clear_cached()
        engine.reset_counters()
        in_flight = 0
        try:
            while True:
                in_flight += self._take(source, in_flight, on_event)
                if not engine.has_unfinished():
                    if source.exhausted:
                        return
                    due = source.next_due_s()
                    if due is not None:
                        time.sleep(max(0.0, due - time.perf_counter()))
                    continue
                outputs = engine.step()
                now = time.perf_counter()
                for output in outputs:
                    in_flight -= output.finished
                    on_event(
                        TokenEvent(output.request_id, now, output.new_token_ids, output.finished)
                    )
        except BaseException:
            for request_id in list(engine.unfinished_ids()):
                engine.abort(request_id)
            raise

    def _take(
        self, source: RequestSource, in_flight: int, on_event: Callable[[TokenEvent], None]
    ) -> int:
        """Queue what is due; how many requests were taken in."""
        taken = 0
        for request in source.poll(time.perf_counter(), in_flight):
            try:
                self.engine.add_request(
                    request.prompt_token_ids,
                    SamplingParams(max_tokens=request.max_tokens, ignore_eos=request.ignore_eos),
                    request.request_id,
                )
                taken += 1
            except RequestError as error:
                on_event(TokenEvent(request.request_id, time.perf_counter(), (), True, str(error)))
        return taken

    def counters(self) -> dict[str, float]:
        """Component counters, and sums and means over the run's steps."""
        steps = self.engine.steps
        counters = self.engine.counters()
        for name in (
            "num_scheduled_tokens",
            "num_prompt_tokens",
            "num_cached_tokens",
            "num_padded_tokens",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_output_tokens",
            "num_idle_rows",
        ):
            counters[f"step.{name}"] = sum(getattr(s, name) for s in steps)
        counters["step.steps"] = len(steps)
        if steps:
            counters["host_us_per_step"] = sum(s.host_us for s in steps) / len(steps)
            counters["host_us_median_step"] = statistics.median(s.host_us for s in steps)
            counters["device_us_per_step"] = sum(s.device_us for s in steps) / len(steps)
            for part in sorted({part for s in steps for part in s.parts_us}):
                total = sum(s.parts_us.get(part, 0.0) for s in steps)
                counters[f"us_per_step.{part}"] = total / len(steps)
            counters.update(self._work())
        return counters

    def _work(self) -> dict[str, float]:
        """Bytes and FLOPs that the model's steps had to move and do, for the roofline."""
        cost = self._info.get("cost")
        if cost is None:
            return {}
        steps = self.engine.steps
        return {
            "bytes_moved": float(sum(cost.bytes_of(s) for s in steps)),
            "flops": float(sum(cost.flops_of(s) for s in steps)),
            "model_seconds": sum(s.device_us for s in steps) * 1e-6,
        }

    def step_records(self) -> list[StepRecord]:
        """The steps of the last run."""
        return list(self.engine.steps)

    def memory(self) -> MemoryLedger | None:
        return self.engine.parts.ledger.read()

    def close(self) -> None:
        """Drop the engine, so that its memory can be freed."""
        del self.engine
