"""Logits behind every token of a prompt, as an engine computes them when it serves the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from workbench.core.errors import WorkbenchError
from workbench.core.sampling import SamplingParams
from workbench.core.step import ForwardBatch
from workbench.engine.engine import Engine
from workbench.engine.model_runner import Model, ModelRunner

#: Rows of logits at once: 128 of 50,000 tokens are 51 MB in float64.
ROWS_AT_ONCE = 128


class PromptLogits:
    """Logits behind the tokens of one prompt, made a slice at a time.

    Hidden states are what is kept: logits of a window are larger by the ratio of vocabulary and
    hidden size.

    Attributes
    ----------
    hidden : Tensor [T, H]
        As :meth:`Model.forward` returns them.
    """

    def __init__(self, model: Model, hidden: torch.Tensor) -> None:
        self._model = model
        self.hidden = hidden

    @torch.inference_mode()
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Logits ``[stop - start, V]``; row ``i`` predicts the token at position ``i + 1``."""
        return self._model.compute_logits(self.hidden[start:stop])


def slices(start: int, stop: int, size: int = ROWS_AT_ONCE) -> Iterator[tuple[int, int]]:
    """Cut ``start .. stop`` into pieces of at most ``size``."""
    for at in range(start, stop, size):
        yield at, min(stop, at + size)


def run_prompt(engine: Engine, token_ids: Sequence[int]) -> PromptLogits:
    """Serve a prompt and keep the hidden states of all of its tokens.

    The engine goes its usual way: its scheduler plans the prompt (in pieces, where the ``prefill``
    slot cuts it), its runner runs the model over its KV pool, and one token is drawn and dropped.
    Nothing is found in a prefix cache, which is emptied first.

    Parameters
    ----------
    engine
        Idle, with room for the prompt and one token.

    Raises
    ------
    WorkbenchError
        The engine cannot serve the prompt; or a prepared step, which keeps no hidden states, ran
        some of it.
    """
    runner: ModelRunner = engine.parts.executor.runner  # type: ignore[attr-defined]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(batch: ForwardBatch, hidden: torch.Tensor) -> None:
        # Both may be buffers that the next step writes to.
        seen.append((batch.positions.clone(), hidden[: batch.num_tokens].clone()))

    engine.clear_cached()
    runner.watcher = watch
    try:
        (output,) = engine.generate(
            [list(token_ids)], SamplingParams(max_tokens=1, ignore_eos=True)
        )
    finally:
        runner.watcher = None
    if output.error is not None:
        raise WorkbenchError(f"a window cannot be served: {output.error}")
    positions = torch.cat([part for part, _ in seen]) if seen else torch.empty(0)
    is_prompt = positions < len(token_ids)  # a step planned ahead may have run the drawn token
    if positions[is_prompt].tolist() != list(range(len(token_ids))):
        raise WorkbenchError(
            f"of a prompt of {len(token_ids)} tokens, {int(is_prompt.sum())} were seen: a prepared "
            "step of single tokens ran the last piece. Choose another window=, by one token say."
        )
    return PromptLogits(runner.parts.model, torch.cat([part for _, part in seen])[is_prompt])
