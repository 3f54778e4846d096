"""Greedy reference outputs: what every exact technique must reproduce, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from workbench.baselines.hf_model import (
    SharedModel,
    acquire,
    quiet_transformers,
    release,
)
from workbench.core.errors import RequestError
from workbench.core.workload import WorkloadRequest

ATTENTION = "sdpa"


@dataclass(frozen=True, slots=True)
class Reference:
    """A greedy continuation and how sure the model was of it.

    Attributes
    ----------
    token_ids
        Output ids.
    margins
        For each of them, the distance in logits between the most likely token and the next one.
        Where it is smaller than rounding can be, another token would have been as right.
    """

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]


class _MarginTap(LogitsProcessor):  # type: ignore[misc]
    """Notes the top-2 margin of ``scores[1, V]`` each step, and changes nothing."""

    def __init__(self) -> None:
        self.margins: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.FloatTensor:
        top = scores[0].topk(2).values
        # Kept on the device: reading it would make every step wait.
        self.margins.append(top[0] - top[1])
        return scores  # type: ignore[return-value]


class _EosStop(StoppingCriteria):  # type: ignore[misc]
    """Stops a batch of one at an end-of-sequence id."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def __call__(
        self, input_ids: torch.Tensor, scores: object, **kwargs: object
    ) -> torch.BoolTensor:
        is_done = int(input_ids[0, -1]) in self._eos_token_ids
        return torch.tensor([is_done], device=input_ids.device)  # type: ignore[return-value]


class ReferenceModel:
    """``model.generate`` with sdpa attention, one request at a time.

    Shares the loaded model with the baselines of the same process. Use it as a context manager,
    or call :meth:`close`.

    Parameters
    ----------
    model_path, dtype, device, weights, seed
        As for the baselines.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "checkpoint",
        seed: int = 0,
    ) -> None:
        self._shared: SharedModel | None = acquire(model_path, dtype, device, weights, seed)

    @property
    def _open_model(self) -> SharedModel:
        if self._shared is None:
            raise RuntimeError("the reference model was closed.")
        return self._shared

    def generate(
        self, prompt_ids: Sequence[int], max_tokens: int, ignore_eos: bool = True
    ) -> Reference:
        """Continue one prompt greedily.

        Parameters
        ----------
        prompt_ids
            Token ids of the prompt.
        max_tokens
            Tokens to generate: exactly that many with ``ignore_eos``, at most that many without.

        Raises
        ------
        RequestError
            The prompt is empty, too long for the context, or has ids out of the vocabulary.
        """
        shared = self._checked(prompt_ids, max_tokens)
        tap = _MarginTap()
        stops = [] if ignore_eos else [_EosStop(shared.eos_token_ids)]
        input_ids = torch.tensor([list(prompt_ids)], device=shared.device)
        with quiet_transformers():
            output_ids = shared.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_tokens,
                    pad_token_id=shared.pad_token_id,
                ),
                logits_processor=LogitsProcessorList([tap]),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        token_ids = tuple(output_ids[0, input_ids.shape[1] :].tolist())
        margins = tuple(torch.stack(tap.margins).tolist())
        assert len(token_ids) == len(margins), "one margin for each output token"
        return Reference(token_ids, margins)

    def margin_at(
        self,
        prompt_ids: Sequence[int],
        output_prefix: Sequence[int],
        token_id: int | None = None,
    ) -> float:
        """Margin of the most likely token after a given prefix, by one teacher-forced forward.

        Parameters
        ----------
        prompt_ids, output_prefix
            Prompt, and the output tokens before the position of interest.
        token_id
            Measure the distance to this token instead of to the second most likely one; 0 where
            it is itself the most likely.

        Returns
        -------
        float
            A difference of logits, at least 0.

        Raises
        ------
        RequestError
            As for :meth:`generate`.
        """
        prefix = [*prompt_ids, *output_prefix]
        shared = self._checked(prefix, 1)
        model: Any = shared.model
        extra = _last_logits_only(model, 1)
        with torch.no_grad():
            input_ids = torch.tensor([prefix], device=shared.device)
            logits = model(input_ids=input_ids, use_cache=False, **extra).logits[0, -1].float()
        top = logits.topk(2).values
        other = top[1] if token_id is None else logits[token_id]
        return float(top[0] - other)

    def margins_of(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> tuple[float, ...]:
        """How far each output token lies from the most likely one, in logits.

        One teacher-forced forward over prompt and output.

        Parameters
        ----------
        prompt_ids, output_ids
            Prompt and an output that any engine gave to it.

        Returns
        -------
        tuple of float
            One distance an output token, at least 0; 0 where the token is the most likely one
            after the tokens before it.

        Raises
        ------
        RequestError
            As for :meth:`generate`.
        """
        if not output_ids:
            return ()
        tokens = [*prompt_ids, *output_ids[:-1]]
        shared = self._checked(tokens, 1)
        model: Any = shared.model
        with torch.no_grad():
            input_ids = torch.tensor([tokens], device=shared.device)
            extra = _last_logits_only(model, len(output_ids))
            logits = model(input_ids=input_ids, use_cache=False, **extra).logits[0]
        logits = logits[-len(output_ids) :].float()
        given = logits.gather(1, torch.tensor([*output_ids], device=logits.device)[:, None])
        return tuple((logits.amax(1) - given[:, 0]).tolist())

    def close(self) -> None:
        """Give the model back; closing twice is harmless."""
        if self._shared is not None:
            shared, self._shared = self._shared, None
            release(shared)

    def __enter__(self) -> ReferenceModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, prompt_ids: Sequence[int], max_tokens: int) -> SharedModel:
        shared = self._open_model
        request = WorkloadRequest("reference", tuple(prompt_ids), max_tokens)
        problem = shared.limits.problem(request)
        if problem is not None:
            raise RequestError(f"no reference: {problem}")
        shared.use_attention(ATTENTION)
        return shared


def _last_logits_only(model: Any, count: int) -> dict[str, int]:
    """Arguments that spare a forward pass the logits before the last ``count``."""
    takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": count} if takes_it else {}


def reference_tokens(
    model_path: str | Path,
    dtype: str,
    device: str | torch.device,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    weights: str = "checkpoint",
    seed: int = 0,
    ignore_eos: bool | Sequence[bool] = True,
) -> list[Reference]:
    """Greedy reference outputs of several prompts, each run alone.

    Parameters
    ----------
    prompts, max_tokens
        One of each a request.
    ignore_eos
        One for all, or one a request.

    Returns
    -------
    list of Reference
        In the order of ``prompts``.

    Raises
    ------
    RequestError
        A prompt that the model cannot serve.
    """
    flags = [ignore_eos] * len(prompts) if isinstance(ignore_eos, bool) else list(ignore_eos)
    with ReferenceModel(model_path, dtype, device, weights, seed) as model:
        return [
            model.generate(prompt, most, flag)
            for prompt, most, flag in zip(prompts, max_tokens, flags, strict=True)
        ]
