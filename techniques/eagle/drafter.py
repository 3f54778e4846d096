"""Drafts by a head that goes on from the target's hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from techniques.draft_heads import (
    EagleModule,
    HeadSpec,
    Target,
    check_target,
    eagle3_layers,
    load_head,
    shipped_head,
    targets_of_shipped,
)
from techniques.eagle.model import EagleModel, HeadModel
from techniques.eagle.step import EagleStep
from techniques.eagle.tree import TreeDrafting, TreeStart
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.step import ForwardBatch
from workbench.engine.draft_runner import DraftDraws, DraftRunner
from workbench.engine.followed import FollowedPlaces
from workbench.engine.trees import is_chain
from workbench.engine.upload import upload
from workbench.models.spec import ModelSpec
from workbench.slots.drafter import (
    DraftContext,
    Drafter,
    DrafterBinding,
    DrafterHost,
    DraftTokens,
    FollowedStep,
    PreparedTokens,
)
from workbench.slots.graph_runner import DRAFT, PreparedStep
from workbench.slots.kv_pool import KVShape

_KINDS = ("eagle", "eagle3")


@dataclass(frozen=True, slots=True)
class HeadDrafterConfig:
    """Options of every :class:`HeadDrafter`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step; of a tree, nodes that are verified.
    tree
        Propose a tree of the most confident drafts instead of a chain of the likeliest.
    tree_depth
        Most drafts on a path of a tree.
    tree_width
        Nodes of a depth that the head runs, and tokens that may follow each of them.
    """

    num_draft_tokens: int = 5
    tree: bool = False
    tree_depth: int = 5
    tree_width: int = 4


@dataclass(frozen=True, slots=True)
class EagleConfig(HeadDrafterConfig):
    """Options of :class:`Eagle`.

    Attributes
    ----------
    head
        Folder of a head in a published layout; None: the one that comes with the workbench for
        this model. Not read with random weights.
    kind
        With random weights: ``eagle`` or ``eagle3``.
    draft_vocab_size
        With random weights, of ``eagle3``: ids that it can propose; 0: all of the target's.
    """

    head: str | None = None
    kind: str = "eagle3"
    draft_vocab_size: int = 32000


@dataclass(frozen=True, slots=True)
class _Start:
    """What a request is drafted from.

    Attributes
    ----------
    index, row
        In the context, and in the request table.
    num_known
        Tokens.
    place
        Token of the last step behind which the last known one was drawn.
    limit
        Drafts.
    """

    index: int
    row: int
    num_known: int
    place: int
    limit: int


class HeadDrafter(Drafter):
    """One decoder layer that reads the target's hidden states and its own; which, is loaded by
    those who derive from it.

    It keeps keys and values of its own layer for the tokens of every step of the target, in the
    same slots. So what requests share of a prefix they share of it too.
    """

    Config = HeadDrafterConfig
    config: HeadDrafterConfig

    def __init__(self, config: HeadDrafterConfig) -> None:
        super().__init__(config)
        for name in ("num_draft_tokens", "tree_depth", "tree_width"):
            value = getattr(config, name)
            if value < 1:
                raise ConfigError(f"engine.drafter.{name}={value} must be 1 or more.")
        self.num_lookahead_tokens = self.num_kv_lookahead = config.num_draft_tokens
        self.proposes_trees = config.tree
        if config.tree:
            num_run = (config.tree_depth - 1) * config.tree_width
            self.num_kv_lookahead = max(config.num_draft_tokens, num_run)
        self._model: HeadModel | None = None
        self._runner: DraftRunner | None = None
        self._trees: TreeDrafting | None = None
        self._step: EagleStep | None = None
        #: Of the last step: features of its pairs, and whose they are.
        self._features: torch.Tensor | None = None
        self._of_prepared: torch.Tensor | None = None  # where prepared steps leave them
        #: Rows of drafts that were begun behind the step that is queued, and behind the last one
        #: whose tokens are known.
        self._begun: frozenset[int] = frozenset()
        self._ahead: frozenset[int] = frozenset()
        self._places = FollowedPlaces()
        self._passes_before = self._tokens_before = 0
        self.reset_counters()

    # -- weights -----------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        return 0 if self._model is None else self._model.num_bytes

    def kv_shape(self) -> KVShape | None:
        model = self._model
        return None if model is None else model.layer.kv_shape(model.features_dtype)

    # -- steps -------------------------------------------------------------------------------------

    def bind(self, binding: DrafterBinding) -> None:
        model = self._model
        assert model is not None, "a drafter is loaded before it is bound"
        self._binding = binding
        attention = binding.make_attention(model.attention_layers, binding.pool)
        runner = DraftRunner(model, binding.table, binding.pool, attention, binding.vocab_size)
        self._runner = runner
        self._trees = None
        if self.config.tree:
            self._trees = TreeDrafting(
                model, runner, self.config.tree_depth, self.config.tree_width
            )
        self._passes_before = self._tokens_before = 0
        self._features, self._places = None, FollowedPlaces()
        self._step, self._of_prepared = None, None
        self._begun = self._ahead = frozenset()
        graphs, parts = binding.graph_runner, binding.step_parts
        if not graphs.prepares:
            return
        most, each = binding.table.padding_row, self.config.num_draft_tokens + 1
        tokens = max(most, each * graphs.largest_verify(parts.attention, each))
        self._of_prepared = torch.zeros(
            tokens, model.layer.hidden_size, dtype=model.features_dtype, device=binding.table.device
        )
        size = min(graphs.largest_verify(attention, 1), most)
        if size and not self.config.tree:
            own = dataclasses.replace(
                parts, pool=runner.pool, attention=attention, components={}, follow=None
            )
            self._step = EagleStep(own, runner, model, size, self.config.num_draft_tokens)

    def prepared_steps(self) -> list[PreparedStep]:
        return [] if self._step is None else [self._step]

    @property
    def kept_layers(self) -> frozenset[int]:
        return frozenset() if self._model is None else frozenset(self._model.kept_layers)

    def follow(self, step: FollowedStep) -> None:
        """Write keys and values of the step's tokens, each joined with the one after it."""
        batch = step.batch
        self._ahead, self._begun = self._begun, frozenset()
        if step.is_followed:
            assert self._of_prepared is not None
            self._features = self._of_prepared[: batch.num_tokens]
        else:
            rows = batch.rows
            if batch.num_tokens != batch.num_requests:
                lengths = batch.query_start_loc.diff()
                rows = torch.repeat_interleave(rows, lengths, output_size=batch.num_tokens)
            self._features = self._fill(batch, rows, step.kept)
        self._places.note(step)

    def follow_prepared(self, batch: ForwardBatch, kept: Mapping[int, torch.Tensor]) -> None:
        if self._of_prepared is None:
            return
        rows = batch.rows.repeat_interleave(batch.num_tokens // batch.num_requests)
        self._of_prepared[: batch.num_tokens].copy_(self._fill(batch, rows, kept))

    def _fill(
        self, batch: ForwardBatch, rows: torch.Tensor, kept: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Features ``[T, H]`` of a batch whose tokens are of these rows of the table, ``[T]``."""
        model, binding = self._model, self._binding
        assert model is not None
        features = model.start(kept)
        following = binding.table.token_ids[rows, batch.positions + 1].long()
        own = dataclasses.replace(batch, input_ids=following, extras={})
        model.fill(own, features, binding.pool)
        return features

    def draft_ahead(self, rows: list[int], step: PreparedTokens) -> None:
        own, graphs = self._step, self._binding.graph_runner
        size = None if own is None else graphs.dispatch(DRAFT, len(rows))
        if size is None:
            return
        assert own is not None and self._of_prepared is not None
        count, each = len(rows), step.new_ids.shape[1]
        num_new = (step.new_ids[:count] >= 0).sum(1)
        # A place ends with its last known token and its drafts; the one that is drafted after was
        # drawn behind the last of these that holds.
        first = torch.arange(each - 2, each * count, each, device=num_new.device)
        index = first + num_new - step.places[:count, 1]
        self._run_prepared(rows, self._of_prepared, index, size)
        self._begun = frozenset(rows)

    def propose(self, context: DraftContext) -> DraftTokens:
        model, runner, features = self._model, self._runner, self._features
        assert model is not None and runner is not None
        drafts: list[list[int]] = [[] for _ in context.rows]
        starts: list[_Start] = []
        for i, (request_id, row, known) in enumerate(
            zip(context.request_ids, context.rows, context.token_ids, strict=True)
        ):
            place = self._places.before_last(request_id, len(known))
            limit = min(
                context.max_draft_tokens[i],
                self.config.num_draft_tokens,
                self._room(row) - len(known) + 1,
            )
            if place is not None and limit > 0:
                starts.append(_Start(i, row, len(known), place, limit))
        if not starts or features is None:
            return DraftTokens(drafts)
        if self._trees is not None:
            return self._draft_trees(self._trees, starts, features, drafts)
        probs: list[torch.Tensor | None] | None = None
        ahead, self._ahead = self._ahead, frozenset()
        if ahead.issuperset(start.row for start in starts):
            for start in starts:
                drafts[start.index] = [0] * start.limit
                self._drafted_tokens += start.limit
            return DraftTokens(drafts, on_device=[True] * len(drafts))
        tokens = self._draft_prepared(starts, features)
        if tokens is None:
            tokens, found = self._draft_eager(starts, features)
            if found is not None:
                probs = [None] * len(drafts)
                for start, own in zip(starts, found, strict=True):
                    probs[start.index] = own
        for start, drawn in zip(starts, tokens, strict=True):
            drafts[start.index] = drawn[: start.limit]
            self._drafted_tokens += start.limit
        return DraftTokens(drafts, probs)

    def _draft_prepared(
        self, starts: Sequence[_Start], features: torch.Tensor
    ) -> list[list[int]] | None:
        """Tokens by the prepared step; None where there is none for this batch."""
        step, table = self._step, self._binding.table
        if step is None:
            return None
        size = self._binding.graph_runner.dispatch(DRAFT, len(starts))
        rows = [start.row for start in starts]
        params = [table.params[row] for row in rows]
        if size is None or not all(p is not None and p.is_greedy for p in params):
            return None
        index = upload([start.place for start in starts], features.device)
        self._run_prepared(rows, features, index, size)
        return step.drafts[: len(starts)].tolist()

    def _run_prepared(
        self, rows: list[int], features: torch.Tensor, index: torch.Tensor, size: int
    ) -> None:
        """Queue the prepared step for these rows, each from its feature ``features[index]``."""
        step, runner, graphs = self._step, self._runner, self._binding.graph_runner
        assert step is not None and runner is not None
        step.fill(rows, [self._room(row) for row in rows], size)
        torch.index_select(features, 0, index, out=step.features[: len(rows)])
        graphs.run(DRAFT, size)
        runner.num_passes += self.config.num_draft_tokens
        runner.num_tokens += len(rows) * self.config.num_draft_tokens

    def _room(self, row: int) -> int:
        """Tokens that a row's blocks hold and the head can rotate."""
        assert self._runner is not None and self._model is not None
        return min(self._runner.capacity(row), self._model.max_positions)

    def _draft_trees(
        self,
        trees: TreeDrafting,
        starts: Sequence[_Start],
        features: torch.Tensor,
        drafts: list[list[int]],
    ) -> DraftTokens:
        """A tree from each start, with certainty, into ``drafts``, which has a list a request."""
        index, last = self._last_known(starts, features.device)
        found = trees.grow(
            [TreeStart(start.row, start.num_known, self._room(start.row)) for start in starts],
            features[index],
            last,
            [start.limit for start in starts],
        )
        parents: list[list[int] | None] = [None] * len(drafts)
        for start, (tokens, own) in zip(starts, found, strict=True):
            drafts[start.index], parents[start.index] = tokens, own
            self._drafted_tokens += len(tokens)
            self._branching_trees += not is_chain(own)
        return DraftTokens(drafts, None, parents)

    def _last_known(
        self, starts: Sequence[_Start], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the features of each last known token lie, and the token, both ``[B]`` int64."""
        packed = upload(
            [
                [start.place for start in starts],
                [start.row for start in starts],
                [start.num_known - 1 for start in starts],
            ],
            device,
        )
        return packed[0], self._binding.table.token_ids[packed[1], packed[2]].long()

    def _draft_eager(
        self, starts: Sequence[_Start], features: torch.Tensor
    ) -> tuple[list[list[int]], torch.Tensor | None]:
        """Tokens, and what they were drawn from where that is asked for."""
        model, runner, binding = self._model, self._runner, self._binding
        assert model is not None and runner is not None
        index, last = self._last_known(starts, features.device)
        model.features = features[index]
        rows, known = [start.row for start in starts], [start.num_known for start in starts]
        draws = DraftDraws(binding.table, rows, known, binding.reads_probs)
        longest = max(start.limit for start in starts)
        tokens = runner.draft_on(rows, [n - 2 for n in known], last, longest, draws.draw)
        return tokens.tolist(), draws.probs()

    def finish(self, request_id: str) -> None:
        self._places.forget(request_id)

    def counters(self) -> dict[str, float]:
        runner = self._runner
        passes = 0 if runner is None else runner.num_passes - self._passes_before
        tokens = 0 if runner is None else runner.num_tokens - self._tokens_before
        return {
            "drafted_tokens": self._drafted_tokens,
            "draft_passes": passes,
            "draft_run_tokens": tokens,
            "branching_trees": self._branching_trees,
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = self._branching_trees = 0
        if self._runner is not None:
            self._passes_before = self._runner.num_passes
            self._tokens_before = self._runner.num_tokens


class Eagle(HeadDrafter):
    """Drafts by a head that was trained for its target."""

    Config = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        if config.kind not in _KINDS:
            raise unknown_name("engine.drafter.kind", config.kind, _KINDS)

    def load(self, host: DrafterHost) -> None:
        target = Target(host.target)
        if host.weights == "random":
            spec, state = self._draw(target, host.seed)
        else:
            loaded = load_head(self._folder(target), target.spec)
            check_target(loaded, target)
            spec, state = loaded.spec, loaded.state
            if spec.kind not in _KINDS:
                raise ConfigError(
                    f"the head in {loaded.folder} is of kind {spec.kind}, and engine/drafter="
                    f"eagle runs {' and '.join(_KINDS)}."
                )
        self._model = EagleModel(spec, state, host.target, expected_tokens=1)

    def _folder(self, target: Target) -> Path:
        """Of the trained head: the one that is named, or that comes with the project."""
        if self.config.head is not None:
            return Path(self.config.head).expanduser()
        folder = shipped_head(target, _KINDS)
        if folder is None:
            raise ConfigError(
                "engine.drafter.head names no trained head, and none for this model comes with the "
                f"workbench (those that come are for {', '.join(targets_of_shipped())}). Train one "
                "with `python -m workbench train_head kind=eagle3`, or name the folder of a "
                "published one for this model."
            )
        return folder

    def _draw(self, target: Target, seed: int) -> tuple[HeadSpec, dict[str, torch.Tensor]]:
        """A random head of this kind for a target."""
        spec = random_spec(target.spec, self.config.kind, self.config.draft_vocab_size)
        lm_head = target.lm_head()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = EagleModule(spec, target.embedding(), lm_head)
        return spec, dict(module.state_dict())


def random_spec(target: ModelSpec, kind: str, draft_vocab_size: int) -> HeadSpec:
    """A head of the size that published ones have for a target: a layer as wide as its own."""
    layer = target.layers[0]
    config = {
        "architectures": [
            "LlamaForCausalLMEagle3" if kind == "eagle3" else "LlamaForCausalLMEagle"
        ],
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_kv_heads,
        "head_dim": layer.attention.head_dim,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.norm_eps,
        "hidden_act": "silu",
    }
    if kind == "eagle3":
        config["draft_vocab_size"] = min(draft_vocab_size or target.vocab_size, target.vocab_size)
        config["eagle_aux_hidden_state_layer_ids"] = list(eagle3_layers(target.num_layers))
    return HeadSpec.from_config(config, target.num_layers)
