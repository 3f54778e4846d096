"""Contexts for drafters, and what a proposal costs without a clock."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np

from workbench.slots.drafter import DraftContext, DraftTokens


def text_like(count: int, seed: int = 0, vocab: int = 3000) -> list[int]:
    """Token ids with the repetition of text: words of one to four tokens out of 400."""
    rng = random.Random(seed)
    words = [[rng.randrange(vocab) for _ in range(rng.randint(1, 4))] for _ in range(400)]
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += rng.choice(words)
    return tokens[:count]


class CountedTokens(np.ndarray):
    """Token ids that note how many of them are taken out."""

    num_read = 0

    def tolist(self) -> Any:
        CountedTokens.num_read += self.size
        return super().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        CountedTokens.num_read += self.size
        return np.asarray(super().__array__(*args, **kwargs))


def context(
    tokens: Sequence[int] | np.ndarray, name: str = "r", limit: int = 100, num_prompt: int = 0
) -> DraftContext:
    """What a drafter sees of one request."""
    ids = np.asarray(tokens, dtype=np.int32)
    return DraftContext([name], [ids], [limit], [num_prompt])


def num_opcodes(call: Callable[[], object]) -> int:
    """Python instructions that a call runs, in whatever functions."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def read_drafts(drafter: Any, context: DraftContext, drafts: DraftTokens) -> list[list[int]]:
    """Proposed tokens by request, those that are on the device alone among them."""
    table, found = drafter._binding.table, list(drafts.token_ids)
    for i, is_there in enumerate(drafts.on_device or ()):
        if is_there and found[i]:
            known = len(context.token_ids[i])
            behind = table.token_ids[context.rows[i], known : known + len(found[i])]
            found[i] = behind.tolist()
    return found
