"""Drafts from heads on the target's last hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from techniques.draft_heads import HeadSpec, MedusaHead, Target, check_target, load_head
from workbench.core.errors import ConfigError, unknown_name
from workbench.engine.followed import FollowedPlaces
from workbench.engine.trees import is_chain, likeliest_paths, static_tree
from workbench.engine.upload import upload
from workbench.models.decoder import Decoder
from workbench.slots.drafter import (
    DraftContext,
    Drafter,
    DrafterHost,
    DraftTokens,
    FollowedStep,
)

_HOW_TO_TRAIN = (
    "Train one with `python -m workbench train_head kind=medusa model=MODEL out=FOLDER` and give "
    "engine.drafter.head=FOLDER, or measure the shape alone with weights=random."
)


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Options of :class:`Medusa`.

    Attributes
    ----------
    head
        Folder of the trained heads; not read with random weights.
    num_draft_tokens
        Most drafts a request a step: of a chain, one a head; of a tree, nodes.
    tree
        ``none``: a chain of each head's likeliest token. ``confidence``: the likeliest paths by the
        heads' probabilities. ``static``: a tree of one shape for all.
    tree_width
        Tokens of a head that may follow a node.
    rank_accuracies
        Of a static tree: how often a head's likeliest token, its second, and so on, are taken to be
        right, for every head alike.
    random_heads, random_draft_vocab
        With random weights: how many heads (0: as many as a chain has drafts), and ids that they
        can propose (0: all).
    """

    head: str | None = None
    num_draft_tokens: int = 3
    tree: str = "none"
    tree_width: int = 4
    rank_accuracies: list[float] = field(default_factory=lambda: [0.5, 0.15, 0.08, 0.05])
    random_heads: int = 0
    random_draft_vocab: int = 8192


TREES = ("none", "static", "confidence")


class Medusa(Drafter):
    """Proposes the likeliest token of each head, or a tree of its likeliest ones.

    The hidden state that the target's last logits came from is all that is read, so drafts cost a
    few small products, and nothing is kept of a request.
    """

    Config = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        for name in ("num_draft_tokens", "tree_width"):
            value = getattr(config, name)
            if value < 1:
                raise ConfigError(f"engine.drafter.{name}={value} must be 1 or more.")
        for name in ("random_heads", "random_draft_vocab"):
            value = getattr(config, name)
            if value < 0:
                raise ConfigError(f"engine.drafter.{name}={value} must be 0 or more.")
        if config.tree not in TREES:
            raise unknown_name("engine.drafter.tree", config.tree, TREES)
        accuracies = config.rank_accuracies
        if not accuracies or not all(0 < a <= 1 for a in accuracies):
            raise ConfigError(
                f"engine.drafter.rank_accuracies={list(accuracies)} must be shares over 0 and up to"
                " 1, by rank."
            )
        self.proposes_trees = config.tree != "none"
        self._paths: list[tuple[int, ...]] = []
        self.num_lookahead_tokens = config.num_draft_tokens
        self._heads: MedusaHead | None = None
        self._target: Decoder | None = None
        self._weight_bytes = 0
        self._hidden: torch.Tensor | None = None  # of the last step
        self._places = FollowedPlaces()
        self.reset_counters()

    def load(self, host: DrafterHost) -> None:
        target = Target(host.target)
        if host.weights == "random":
            heads = _random_heads(self.config, target, host)
        else:
            heads = self._trained_heads(target, host)
        heads.requires_grad_(False)
        self._heads, self._target = heads, host.target
        self._weight_bytes = _num_bytes(heads, host.target)
        if self.config.tree_width > heads.spec.draft_vocab_size:
            raise ConfigError(
                f"engine.drafter.tree_width={self.config.tree_width} is over the "
                f"{heads.spec.draft_vocab_size} ids that the heads can propose."
            )
        self._paths = self._shape_of_all() if self.config.tree == "static" else []

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts: list[list[int]] = [[] for _ in context.request_ids]
        lengths = [len(known) for known in context.token_ids]
        places = self._places.all_before_last(context.request_ids, lengths)
        wanted = [i for i, place in enumerate(places) if place is not None]
        if not wanted or self._hidden is None:
            return DraftTokens(drafts)
        hidden = self._hidden[upload([places[i] or 0 for i in wanted], self._hidden.device)]
        limits = [max(0, context.max_draft_tokens[i]) for i in wanted]
        if self.proposes_trees:
            return self._trees(context, wanted, hidden, limits)
        best = self.candidates(hidden, 1)[0][..., 0].tolist()
        for i, row, limit in zip(wanted, best, limits, strict=True):
            drafts[i] = row[:limit]
        self._drafted_tokens += sum(map(len, drafts))
        return DraftTokens(drafts)

    def candidates(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest ids of each head that drafts, best first, int64 ``[B, K, count]``, and their
        log-probabilities, from hidden states ``[B, H]`` before the final norm."""
        assert self._heads is not None and self._target is not None, "load() was not called"
        return self._heads.top(self._target.normalize(hidden), count, self._num_heads)

    @property
    def _num_heads(self) -> int:
        """That draft."""
        assert self._heads is not None
        most = self._heads.spec.num_heads
        return most if self.proposes_trees else min(most, self.num_lookahead_tokens)

    def _trees(
        self,
        context: DraftContext,
        wanted: Sequence[int],
        hidden: torch.Tensor,
        limits: Sequence[int],
    ) -> DraftTokens:
        """Trees behind the hidden states of the requests that are ``wanted``."""
        drafts: list[list[int]] = [[] for _ in context.request_ids]
        parents: list[list[int] | None] = [None] * len(drafts)
        ids, logprobs = (x.tolist() for x in self.candidates(hidden, self.config.tree_width))
        for i, own, likely, limit in zip(wanted, ids, logprobs, limits, strict=True):
            limit = min(limit, self.num_lookahead_tokens)
            paths = self._paths or likeliest_paths(likely, limit)
            drafts[i], parents[i] = static_tree(own, paths, limit)
            self._branching_trees += not is_chain(parents[i] or [])
        self._drafted_tokens += sum(map(len, drafts))
        return DraftTokens(drafts, None, parents)

    def _shape_of_all(self) -> list[tuple[int, ...]]:
        """Paths of a static tree."""
        ranks = self.config.rank_accuracies[: self.config.tree_width]
        likely = [[math.log(share) for share in ranks]] * self._num_heads
        return likeliest_paths(likely, self.num_lookahead_tokens)

    @property
    def kept_layers(self) -> frozenset[int]:
        return frozenset() if self._target is None else frozenset({self._target.spec.num_layers})

    def follow(self, step: FollowedStep) -> None:
        (self._hidden,) = step.kept.values()
        self._places.note(step)

    def finish(self, request_id: str) -> None:
        self._places.forget(request_id)

    def counters(self) -> dict[str, float]:
        return {
            "drafted_tokens": self._drafted_tokens,
            "branching_trees": self._branching_trees,
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = self._branching_trees = 0

    def _trained_heads(self, target: Target, host: DrafterHost) -> MedusaHead:
        folder, wanted = self.config.head, self.config.num_draft_tokens
        if not folder:
            raise ConfigError(
                f"engine.drafter.head is not set: no heads are known. {_HOW_TO_TRAIN}"
            )
        loaded = load_head(folder, target.spec)
        spec = loaded.spec
        if spec.kind != "medusa":
            raise ConfigError(
                f"engine.drafter.head={folder} holds a head of kind {spec.kind}, not Medusa heads. "
                + _HOW_TO_TRAIN
            )
        check_target(loaded, target)
        if spec.num_heads < wanted and not self.proposes_trees:
            raise ConfigError(
                f"engine.drafter.num_draft_tokens={wanted} is over the {spec.num_heads} heads in "
                f"{folder}; valid: 1 to {spec.num_heads}."
            )
        d2t = loaded.d2t
        lm_head = target.lm_head() if spec.shares_lm_head else None
        with torch.device(host.device):
            heads = MedusaHead(spec, lm_head, None if d2t is None else d2t.to(host.device))
        heads.load_state_dict(loaded.state, strict=False)  # names were checked when it was read
        return heads.to(host.device, host.dtype)


def _random_heads(config: MedusaConfig, target: Target, host: DrafterHost) -> MedusaHead:
    """Heads of a shape that says how fast they are, drawn by the seed."""
    vocab = target.spec.vocab_size
    spec = HeadSpec(
        kind="medusa",
        hidden_size=target.spec.hidden_size,
        vocab_size=vocab,
        draft_vocab_size=min(config.random_draft_vocab or vocab, vocab),
        num_heads=config.random_heads or config.num_draft_tokens,
    )
    size = spec.draft_vocab_size
    d2t = torch.zeros(size, dtype=torch.int64, device=host.device)
    with torch.device(host.device):
        heads = MedusaHead(spec, None, d2t if spec.has_reduced_vocab else None).to(host.dtype)
    generator = torch.Generator(host.device).manual_seed(host.seed)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=target.spec.initializer_range, generator=generator)
    return heads


def _num_bytes(heads: MedusaHead, target: Decoder) -> int:
    """Bytes of the heads; a shared output layer counts where it is a copy."""
    tensors = [*heads.parameters(), *heads.buffers()]
    tensors += [t for t in heads._shared if t is not None and t is not target.embedding]
    return sum(t.numel() * t.element_size() for t in tensors)
