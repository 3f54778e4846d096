"""Counting of calls, by the kind of step that they serve."""

from __future__ import annotations

from typing import Any, Literal

from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionBackend

#: Steps in which every request runs one token, and all others. Kernels are chosen by it, no
#: scheduling is: a step that mixes prompts, drafts and single tokens is simply not the first kind.
Phase = Literal["decode", "prefill"]


def phase_of(batch: ForwardBatch) -> Phase:
    """``decode`` where every request runs one token, else ``prefill``."""
    return "decode" if batch.max_query_len == 1 else "prefill"


class CountingAttention(AttentionBackend):
    """A backend that counts its calls, one a layer and step."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._calls: dict[str, float] = {}
        self.reset_counters()

    def count(self, phase: Phase) -> None:
        """Note one call."""
        self._calls[f"{phase}_calls"] += 1

    def counters(self) -> dict[str, float]:
        return dict(self._calls)

    def reset_counters(self) -> None:
        self._calls = {"decode_calls": 0, "prefill_calls": 0}
