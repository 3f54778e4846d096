"""A token budget a step, shared by decodes and pieces of prompts (arXiv:2403.02310, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.slots.prefill import Prefill


@dataclass(frozen=True, slots=True)
class ChunkedConfig:
    """Options of :class:`Chunked`.

    Attributes
    ----------
    chunk_tokens
        Most tokens a step. Small: short gaps between a running request's tokens. Large: prompts
        finish sooner.
    """

    chunk_tokens: int = 256


class Chunked(Prefill):
    """Fill the budget: decodes first (they stand first in the batch), then pieces of prompts."""

    Config = ChunkedConfig
    config: ChunkedConfig

    def __init__(self, config: ChunkedConfig) -> None:
        super().__init__(config)
        if config.chunk_tokens < 1:
            raise ConfigError(
                f"engine.prefill.chunk_tokens={config.chunk_tokens} must be 1 or more."
            )

    def token_budget(self, max_num_batched_tokens: int) -> int:
        return min(max_num_batched_tokens, self.config.chunk_tokens)

    def num_tokens(self, outstanding: int, budget: int, step_is_empty: bool) -> int:
        return min(outstanding, budget)
