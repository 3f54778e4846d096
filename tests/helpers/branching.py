"""A drafter of trees in which the right continuation stands at a random branch."""

from __future__ import annotations

import random

from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

#: Overrides that make an engine draft by it.
BRANCHING = (
    "engine.drafter._target_=tests.helpers.branching.BranchingDrafter",
    "engine/verifier=exact_match",
)


class BranchingDrafter(Drafter):
    """Proposes random trees of up to ten nodes; one path of each goes on as ``answers`` say, for
    some of its length."""

    proposes_trees = True

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.num_lookahead_tokens = 10
        #: Whole texts, prompt and answer.
        self.answers: list[list[int]] = []
        self.rng = random.Random(0)
        self.vocab_size = 128
        #: Trees whose right path leaves the first branch.
        self.num_branches = 0

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts, parents = [], []
        for tokens, limit in zip(context.token_ids, context.max_draft_tokens, strict=True):
            known = tokens.tolist()
            answer = next((a for a in self.answers if a[: len(known)] == known), [])
            tree = self._tree(answer[len(known) :], min(limit, self.num_lookahead_tokens))
            drafts.append(tree[0])
            parents.append(tree[1])
        return DraftTokens(drafts, None, parents)

    def _tree(self, right: list[int], limit: int) -> tuple[list[int], list[int]]:
        rng = self.rng
        size = rng.randint(0, limit)
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[int, set[int]] = {}
        # Behind which node the right path goes on, and with what.
        at, rest = -1, right[: rng.randint(0, len(right))]
        while len(tokens) < size:
            goes_on = bool(rest) and rng.random() < 0.5
            parent = at if goes_on else rng.randint(-1, len(tokens) - 1)
            token = rest[0] if goes_on else rng.randrange(self.vocab_size)
            if token in children.setdefault(parent, set()):
                if goes_on:  # it stands there by chance
                    rest = []
                continue
            children[parent].add(token)
            tokens.append(token)
            parents.append(parent)
            if goes_on:
                self.num_branches += parent != len(tokens) - 2
                at, rest = len(tokens) - 1, rest[1:]
        return tokens, parents

    def finish(self, request_id: str) -> None: ...
