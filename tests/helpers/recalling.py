"""A drafter that has seen the answers, and recalls them with gaps and errors."""

from __future__ import annotations

import random

from techniques.spec_decode.ngram import NgramConfig
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

#: Overrides that speculate with it, and with up to five drafts a request.
RECALLING = (
    "engine/drafter=ngram",
    "engine/verifier=exact_match",
    "engine.drafter._target_=tests.helpers.recalling.RecallingDrafter",
    "engine.drafter.num_draft_tokens=5",
)


class RecallingDrafter(Drafter):
    """Continues whichever of :attr:`answers` (prompt and output) begins with a request's tokens.

    Of every draft it is drawn how long it is, from nothing up, and which token of it is wrong, if
    one is; not where :attr:`is_sure`.
    """

    Config = NgramConfig
    config: NgramConfig

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        self.num_lookahead_tokens = config.num_draft_tokens
        self.answers: list[list[int]] = []
        self.is_sure = False
        self.rng = random.Random(0)

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts = []
        for tokens, limit in zip(context.token_ids, context.max_draft_tokens, strict=True):
            known = tokens.tolist()
            found = next((a for a in self.answers if a[: len(known)] == known), known)
            most = self.num_lookahead_tokens
            if not self.is_sure:
                most = self.rng.choice([0, 0, *range(1, most + 1)])
            draft = found[len(known) :][: min(limit, most)]
            if draft and not self.is_sure and self.rng.random() < 0.5:
                draft[self.rng.randrange(len(draft))] = self.rng.randrange(4, 128)
            drafts.append(draft)
        return DraftTokens(drafts)

    def finish(self, request_id: str) -> None: ...
