"""A padded static batch at the size and cache that suit the workload best."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workbench.baselines.hf_generate import (
    CACHE_IMPLEMENTATIONS,
    HfStaticBatch,
    TokenTap,
    _Row,
)
from workbench.baselines.hf_model import quiet_transformers
from workbench.baselines.intake import Intake
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class Trial:
    """What one batch size with one cache was measured at.

    Attributes
    ----------
    prefill_tok_s
        Prompt tokens a second, padding included.
    step_s
        Median seconds of a decode step of the batch.
    output_tok_s
        Estimated output tokens a second over the whole workload, in batches of this size.
    """

    batch_size: int
    cache_implementation: str
    prefill_tok_s: float
    step_s: float
    output_tok_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Every trial, the tokens that prompts were cut to, and the seconds that it all took."""

    trials: tuple[Trial, ...]
    prompt_tokens: int
    seconds: float

    @property
    def chosen(self) -> Trial:
        """The trial with the highest estimate."""
        return max(self.trials, key=lambda trial: trial.output_tok_s)


# A baseline that is closed and built again between rounds must not come to another choice.
_calibrations: dict[tuple[Any, ...], Calibration] = {}


def estimate_output_tok_s(
    requests: Sequence[WorkloadRequest], batch_size: int, prefill_tok_s: float, step_s: float
) -> float:
    """Estimate the output rate of ``requests``, served in order in batches of ``batch_size``.

    Each batch costs its padded prompts at ``prefill_tok_s`` and a step of ``step_s`` for each
    further token of its longest output. Only the tokens asked for count as output.
    """
    seconds = 0.0
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(request.prompt_token_ids) for request in batch)
        longest = max(request.max_tokens for request in batch)
        seconds += len(batch) * width / prefill_tok_s + (longest - 1) * step_s
    return sum(request.max_tokens for request in requests) / seconds


class HfStaticBatchBest(HfStaticBatch):
    """The static batch, with batch size and cache chosen by a short calibration.

    The calibration runs a few steps of the workload's own prompts at each size of a ladder with
    a growing cache, until a size is clearly worse than the best so far, then tries a static cache
    at the two best sizes. The estimate of the whole workload decides. It happens in
    :meth:`prepare`, or in the first ``run`` where ``prepare`` was not called, and once in a
    process for the same model, options and workload shape. Requests keep the order of arrival:
    they are not sorted by length.

    Parameters
    ----------
    batch_sizes
        The ladder; sizes over the number of requests (or of the load's concurrency) are left out.
    cache_implementations
        Which caches may be chosen.
    calibration_steps
        Forward passes of a trial, the prompt's included; at least 3.
    calibration_budget_s
        Bound on the whole calibration, in seconds: prompts are cut so that its prefills fit in
        half of it, and no trial starts after it.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
        cache_implementations: Sequence[str] = CACHE_IMPLEMENTATIONS,
        calibration_steps: int = 6,
        calibration_budget_s: float = 20.0,
        name: str = "hf_static_batch_best",
        **options: Any,
    ) -> None:
        ladder = tuple(sorted({int(size) for size in batch_sizes}))
        if not ladder or ladder[0] < 1:
            raise ConfigError(f"batch_sizes={list(batch_sizes)} needs sizes of at least 1.")
        for cache in cache_implementations:
            if cache not in CACHE_IMPLEMENTATIONS:
                raise unknown_name("cache_implementation", cache, CACHE_IMPLEMENTATIONS)
        if not cache_implementations:
            raise ConfigError("cache_implementations is empty: name at least one.")
        if calibration_steps < 3 or calibration_budget_s <= 0:
            raise ConfigError(
                "calibration_steps must be at least 3 (a prompt and two decode steps) and "
                f"calibration_budget_s over 0; got {calibration_steps} and {calibration_budget_s}."
            )
        super().__init__(
            model_path,
            batch_size=ladder[-1],
            cache_implementation=cache_implementations[0],
            name=name,
            **options,
        )
        self._ladder = ladder
        self._caches = tuple(cache_implementations)
        self._calibration_steps = calibration_steps
        self._calibration_budget_s = calibration_budget_s
        self._calibration: Calibration | None = None

    def prepare(
        self, requests: Sequence[WorkloadRequest], max_concurrency: int | None = None
    ) -> None:
        """Calibrate on ``requests``; see :class:`HfStaticBatchBest`."""
        usable = [request for request in requests if self._limits.problem(request) is None]
        if usable:
            self.shared.use_attention(self._attn_implementation)
            with quiet_transformers():
                self._calibrate(usable, max_concurrency or len(usable))

    def _details(self) -> dict[str, Any]:
        calibration = self._calibration
        return {
            **super()._details(),
            "is_calibrated": calibration is not None,
            "calibration_s": round(calibration.seconds, 3) if calibration else 0.0,
            "calibration_prompt_tokens": calibration.prompt_tokens if calibration else 0,
            "trials": [asdict(trial) for trial in calibration.trials] if calibration else [],
        }

    def _serve(self, intake: Intake) -> None:
        if self._calibration is not None:
            super()._serve(intake)
            return
        first = intake.wait()
        if first:
            # What has arrived so far may be fewer than will be in flight later: repeat it.
            largest = self._ladder[-1]
            shape = list(itertools.islice(itertools.cycle(first), max(largest, len(first))))
            self._calibrate(shape, largest)
            self._serve_from(first, intake)

    def _calibrate(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> None:
        """Choose the batch size and the cache, or take what this process chose before."""
        most = min(len(requests), max_concurrency)
        key = (
            self.shared.key,
            self._attn_implementation,
            self._compile,
            self._ladder,
            self._caches,
            self._calibration_steps,
            self._calibration_budget_s,
            most,
            tuple((len(request.prompt_token_ids), request.max_tokens) for request in requests),
        )
        if key not in _calibrations:
            _calibrations[key] = self._measure(requests, most)
        self._calibration = _calibrations[key]
        chosen = self._calibration.chosen
        self._batch_size = chosen.batch_size
        self._cache_implementation = chosen.cache_implementation

    def _measure(self, requests: Sequence[WorkloadRequest], most: int) -> Calibration:
        """Try sizes up to ``most``, then the other caches at the two best of them."""
        start = time.perf_counter()
        sizes = [size for size in self._ladder if size <= most] or [min(self._ladder[0], most)]
        prompt_tokens = self._prompt_budget(requests, sizes)
        trials: list[Trial] = []
        for size in sizes:
            try:
                trial = self._try(requests, size, self._caches[0], prompt_tokens)
            except torch.OutOfMemoryError:
                if not trials:
                    raise
                break
            trials.append(trial)
            best_tok_s = max(t.output_tok_s for t in trials)
            is_late = time.perf_counter() - start > self._calibration_budget_s
            if is_late or trial.output_tok_s < 0.8 * best_tok_s:
                break
        finalists = sorted(trials, key=lambda t: -t.output_tok_s)[:2]
        for cache in self._caches[1:]:
            for finalist in finalists:
                if time.perf_counter() - start <= self._calibration_budget_s:
                    trials.append(self._try(requests, finalist.batch_size, cache, prompt_tokens))
        self._end_run()
        return Calibration(tuple(trials), prompt_tokens, time.perf_counter() - start)

    def _prompt_budget(self, requests: Sequence[WorkloadRequest], sizes: Sequence[int]) -> int:
        """Tokens to cut prompts to, so that the prefills of all trials fit half the budget.

        The rate comes from the first request alone, run twice: the first call pays for what
        libraries set up once.
        """
        longest = max(len(request.prompt_token_ids) for request in requests)
        probe = min(len(requests[0].prompt_token_ids), 64)
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            tap = self._short_run(requests[:1], probe, self._caches[0], num_steps=1)
            seconds = tap.step_times_s[0] - start
        rows = sum(sizes) + (len(self._caches) - 1) * sum(sizes[-2:])
        affordable = int(self._calibration_budget_s / 2 * (probe / seconds) / rows)
        room = self._limits.max_model_len - self._calibration_steps
        return max(1, min(longest, affordable, room))

    def _try(
        self, requests: Sequence[WorkloadRequest], size: int, cache: str, prompt_tokens: int
    ) -> Trial:
        batch = requests[:size]
        width = min(prompt_tokens, max(len(r.prompt_token_ids) for r in batch))
        start = time.perf_counter()
        tap = self._short_run(batch, width, cache, self._calibration_steps)
        times = tap.step_times_s
        # The first decode step allocates what later ones reuse.
        steps = [after - before for before, after in itertools.pairwise(times[1:])]
        prefill_tok_s = size * width / (times[0] - start)
        step_s = statistics.median(steps)
        return Trial(
            batch_size=size,
            cache_implementation=cache,
            prefill_tok_s=prefill_tok_s,
            step_s=step_s,
            output_tok_s=estimate_output_tok_s(requests, size, prefill_tok_s, step_s),
        )

    def _short_run(
        self, requests: Sequence[WorkloadRequest], width: int, cache: str, num_steps: int
    ) -> TokenTap:
        rows = [
            _Row(
                replace(
                    request,
                    prompt_token_ids=request.prompt_token_ids[:width],
                    max_tokens=num_steps,
                    ignore_eos=True,
                )
            )
            for request in requests
        ]
        return self._generate(rows, None, cache)
