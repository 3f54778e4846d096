"""``model.generate``: one request at a time, or a padded batch at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from workbench.baselines.hf_backend import HfBackend
from workbench.baselines.intake import Intake
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.workload import WorkloadRequest

CACHE_IMPLEMENTATIONS = ("dynamic", "static")


@dataclass(slots=True)
class _Row:
    """One request in a batch."""

    request: WorkloadRequest
    num_output_tokens: int = 0
    is_done: bool = False


class TokenTap(StoppingCriteria):  # type: ignore[misc]
    """Called by ``generate`` after each step: tells every row's new token, and ends rows.

    ``generate`` waits for the device once a step anyway, to learn whether every row has ended;
    reading the tokens here takes the place of that wait.

    Parameters
    ----------
    rows
        The batch's requests, in the order of the batch's rows.
    eos_token_ids
        Ids that end a row which does not ignore them.
    intake
        Where tokens are told; None tells nobody (calibration).
    """

    def __init__(
        self, rows: Sequence[_Row], eos_token_ids: frozenset[int], intake: Intake | None
    ) -> None:
        self.rows = rows
        self.step_times_s: list[float] = []
        self.num_wasted_tokens = 0
        self._eos_token_ids = eos_token_ids
        self._intake = intake
        self._done: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        """Forward passes so far; the first is the prompt's."""
        return len(self.step_times_s)

    def __call__(
        self, input_ids: torch.Tensor, scores: object, **kwargs: object
    ) -> torch.BoolTensor:
        """Take the last column of ``input_ids[B, L]``; return which rows have ended, ``[B]``."""
        token_ids = input_ids[:, -1].tolist()
        now = time.perf_counter()
        self.step_times_s.append(now)
        if self._done is None:
            self._done = torch.zeros(len(self.rows), dtype=torch.bool, device=input_ids.device)
        for index, (row, token_id) in enumerate(zip(self.rows, token_ids, strict=True)):
            if row.is_done:
                self.num_wasted_tokens += 1
                continue
            row.num_output_tokens += 1
            row.is_done = row.num_output_tokens >= row.request.max_tokens or (
                not row.request.ignore_eos and token_id in self._eos_token_ids
            )
            if row.is_done:
                self._done[index] = True
            if self._intake is not None:
                self._intake.tell(
                    row.request.request_id, (token_id,), time_s=now, finished=row.is_done
                )
        return self._done  # type: ignore[return-value]


class HfStaticBatch(HfBackend):
    """Padded batches of a fixed size, each run to the end of its longest request.

    Requests are taken in the order of arrival. A batch holds what has arrived when the one before
    it ends, up to ``batch_size``; prompts are padded on the left. Tokens generated for a row after
    its own end are not told, and counted as ``wasted_tokens``.

    Parameters
    ----------
    batch_size
        Most requests in a batch.
    cache_implementation
        ``dynamic`` grows the KV cache by a token a step, ``static`` allocates it for the batch.
    compile
        Let ``generate`` compile the model where it would by itself: with a static cache, not on
        the CPU. The first batch of each shape then takes minutes.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        batch_size: int = 8,
        cache_implementation: str = "dynamic",
        compile: bool = False,
        name: str = "hf_static_batch",
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is not valid: it must be at least 1.")
        if cache_implementation not in CACHE_IMPLEMENTATIONS:
            raise unknown_name("cache_implementation", cache_implementation, CACHE_IMPLEMENTATIONS)
        super().__init__(model_path, name=name, **options)
        self._batch_size = batch_size
        self._cache_implementation = cache_implementation
        self._compile = compile

    def _details(self) -> dict[str, Any]:
        return {
            "batch_size": self._batch_size,
            "cache_implementation": self._cache_implementation,
            "compile": self._compile,
        }

    def _serve(self, intake: Intake) -> None:
        self._serve_from((), intake)

    def _serve_from(self, first: Sequence[WorkloadRequest], intake: Intake) -> None:
        """Serve ``first``, which ``intake`` gave already, and all that follows."""
        waiting = deque(first)
        while True:
            waiting.extend(intake.pull() if waiting else intake.wait())
            if not waiting:
                return
            size = min(self._batch_size, len(waiting))
            self._serve_batch([waiting.popleft() for _ in range(size)], intake)

    def _serve_batch(self, requests: Sequence[WorkloadRequest], intake: Intake) -> None:
        rows = [_Row(request) for request in requests]
        try:
            tap = self._generate(rows, intake, self._cache_implementation)
        except torch.OutOfMemoryError as error:
            for row in rows:
                if not row.is_done:
                    intake.fail(
                        row.request.request_id,
                        f"out of memory in a batch of {len(rows)}: {error}. Lower batch_size.",
                    )
            self.shared.probe.trim()
            return
        lengths = [len(request.prompt_token_ids) for request in requests]
        self._num_steps += tap.num_steps
        self._num_wasted_tokens += tap.num_wasted_tokens
        self._num_padded_prompt_tokens += len(rows) * max(lengths) - sum(lengths)
        is_dynamic = self._cache_implementation == "dynamic"
        longest = tap.num_steps if is_dynamic else max(r.max_tokens for r in requests)
        # The last token of a row is never fed back, so its KV is never written.
        self._count_kv(
            allocated_tokens=len(rows) * (max(lengths) + longest - 1),
            used_tokens=sum(lengths) + sum(row.num_output_tokens - 1 for row in rows),
        )

    def _generate(
        self, rows: Sequence[_Row], intake: Intake | None, cache_implementation: str
    ) -> TokenTap:
        """Run one batch through ``model.generate``."""
        model = self.shared.model
        input_ids, attention_mask = self._pad([row.request.prompt_token_ids for row in rows])
        tap = TokenTap(rows, self.shared.eos_token_ids, intake)
        # ``generate`` never lets a static cache shrink, to spare compilations. Without compilation
        # that would make every later batch attend over the longest one's length.
        if not self._compile and hasattr(model, "_previous_max_cache_length"):
            del model._previous_max_cache_length
        model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(row.request.max_tokens for row in rows),
                pad_token_id=self.shared.pad_token_id,
                cache_implementation=None if cache_implementation == "dynamic" else "static",
                disable_compile=not self._compile,
            ),
            stopping_criteria=StoppingCriteriaList([tap]),
        )
        return tap

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad on the left: ``input_ids[B, L]`` and ``attention_mask[B, L]``, both int64."""
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        pad_id = self.shared.pad_token_id
        ids = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        device = self.shared.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _end_run(self) -> None:
        if self._shared is not None and hasattr(self._shared.model, "_previous_max_cache_length"):
            del self._shared.model._previous_max_cache_length


class HfNaive(HfStaticBatch):
    """One request at a time, with a growing KV cache: the loop of a first script."""

    def __init__(self, model_path: str | Path, *, name: str = "hf_naive", **options: Any) -> None:
        super().__init__(model_path, batch_size=1, name=name, **options)
