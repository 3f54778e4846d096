"""Drafts that mean nothing, for measuring what drafts cost."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

#: Odd and large, so that drafts spread over the known tokens.
_STRIDE = 2654435761


@dataclass(frozen=True, slots=True)
class SyntheticDrafterConfig:
    """Options of :class:`SyntheticDrafter`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    """

    num_draft_tokens: int = 5


class SyntheticDrafter(Drafter):
    """Proposes as many tokens as it may, taken from here and there in the request's own."""

    Config = SyntheticDrafterConfig
    config: SyntheticDrafterConfig

    def __init__(self, config: SyntheticDrafterConfig) -> None:
        super().__init__(config)
        if config.num_draft_tokens < 1:
            raise ConfigError(
                f"engine.drafter.num_draft_tokens={config.num_draft_tokens} must be 1 or more."
            )
        self.num_lookahead_tokens = config.num_draft_tokens
        self._drafted_tokens = 0

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts = []
        for tokens, limit in zip(context.token_ids, context.max_draft_tokens, strict=True):
            known = len(tokens)
            count = min(limit, self.config.num_draft_tokens)
            drafts.append([int(tokens[(known + i) * _STRIDE % known]) for i in range(count)])
            self._drafted_tokens += count
        return DraftTokens(drafts)

    def finish(self, request_id: str) -> None: ...

    def counters(self) -> dict[str, float]:
        return {"drafted_tokens": self._drafted_tokens}

    def reset_counters(self) -> None:
        self._drafted_tokens = 0
