"""Drafts by a head that goes on from the target's hidden states."""

from __future__ import annotations

import dataclasses
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
)
from techniques.eagle.model import EagleModel
from workbench.core.errors import ConfigError, unknown_name
from workbench.engine.draft_runner import DraftDraws, DraftRunner, Span
from workbench.engine.followed import FollowedPlaces
from workbench.models.spec import ModelSpec
from workbench.slots.drafter import (
    DraftContext,
    Drafter,
    DrafterBinding,
    DrafterHost,
    DraftTokens,
    FollowedStep,
)
from workbench.slots.kv_pool import KVShape

_KINDS = ("eagle", "eagle3")


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """Options of :class:`Eagle`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    head
        Folder of a head in a published layout; not read with random weights.
    kind
        With random weights: ``eagle`` or ``eagle3``.
    draft_vocab_size
        With random weights, of ``eagle3``: ids that it can propose; 0: all of the target's.
    """

    num_draft_tokens: int = 5
    head: str | None = None
    kind: str = "eagle3"
    draft_vocab_size: int = 32000


class Eagle(Drafter):
    """One decoder layer that reads the target's hidden states and its own.

    It runs over the tokens of every step of the target, and keeps keys and values of its own layer
    in the same slots. So what requests share of a prefix they share of it too.
    """

    Config = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        if config.num_draft_tokens < 1:
            raise ConfigError(
                f"engine.drafter.num_draft_tokens={config.num_draft_tokens} must be 1 or more."
            )
        if config.kind not in _KINDS:
            raise unknown_name("engine.drafter.kind", config.kind, _KINDS)
        self.num_lookahead_tokens = self.num_kv_lookahead = config.num_draft_tokens
        self._model: EagleModel | None = None
        self._runner: DraftRunner | None = None
        #: Of the last step: what came out, and whose it is.
        self._hidden: torch.Tensor | None = None
        self._places = FollowedPlaces()
        self._passes_before = self._tokens_before = 0
        self.reset_counters()

    # -- weights -----------------------------------------------------------------------------------

    def load(self, host: DrafterHost) -> None:
        target = Target(host.target)
        if host.weights == "random":
            spec, state = self._draw(target, host.seed)
        else:
            if self.config.head is None:
                raise ConfigError(
                    "engine.drafter.head names no trained head. Train one with `python -m "
                    "workbench train_head kind=eagle3`, or name the folder of a published one "
                    "for this model."
                )
            loaded = load_head(Path(self.config.head).expanduser(), target.spec)
            check_target(loaded, target)
            spec, state = loaded.spec, loaded.state
            if spec.kind not in _KINDS:
                raise ConfigError(
                    f"the head in {self.config.head} is of kind {spec.kind}, and engine/drafter="
                    f"eagle runs {' and '.join(_KINDS)}."
                )
        self._model = EagleModel(spec, state, host.target, expected_tokens=1)

    def _draw(self, target: Target, seed: int) -> tuple[HeadSpec, dict[str, torch.Tensor]]:
        """A random head of this kind for a target."""
        spec = random_spec(target.spec, self.config.kind, self.config.draft_vocab_size)
        lm_head = target.lm_head()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = EagleModule(spec, target.embedding(), lm_head)
        return spec, dict(module.state_dict())

    @property
    def weight_bytes(self) -> int:
        return 0 if self._model is None else self._model.num_bytes

    def kv_shape(self) -> KVShape | None:
        model = self._model
        return None if model is None else model.spec.layer.kv_shape(model.features_dtype)

    # -- steps -------------------------------------------------------------------------------------

    def bind(self, binding: DrafterBinding) -> None:
        model = self._model
        assert model is not None, "a drafter is loaded before it is bound"
        self._binding = binding
        attention = binding.make_attention(model.attention_layers, binding.pool)
        self._runner = DraftRunner(
            model, binding.table, binding.pool, attention, binding.vocab_size
        )
        self._passes_before = self._tokens_before = 0
        self._hidden, self._places = None, FollowedPlaces()

    @property
    def kept_layers(self) -> frozenset[int]:
        return frozenset() if self._model is None else frozenset(self._model.kept_layers)

    def follow(self, step: FollowedStep) -> None:
        """Run over the step's tokens, each with the one after it."""
        model, runner, batch = self._model, self._runner, step.batch
        assert model is not None and runner is not None
        table = self._binding.table
        rows = batch.rows
        if batch.num_tokens != batch.num_requests:
            lengths = batch.query_start_loc.diff()
            rows = torch.repeat_interleave(rows, lengths, output_size=batch.num_tokens)
        model.start(step.kept)
        following = table.token_ids[rows, batch.positions + 1].long()
        own = dataclasses.replace(batch, input_ids=following, extras={})
        self._hidden = runner.forward(own)
        self._places.note(step)

    def propose(self, context: DraftContext) -> DraftTokens:
        model, runner, binding = self._model, self._runner, self._binding
        assert model is not None and runner is not None
        drafts: list[list[int]] = [[] for _ in context.rows]
        spans, wanted, places, limits = [], [], [], []
        for i, (request_id, row, known) in enumerate(
            zip(context.request_ids, context.rows, context.token_ids, strict=True)
        ):
            place = self._places.before_last(request_id, len(known))
            room = min(runner.capacity(row), model.max_positions) - len(known) + 1
            limit = min(context.max_draft_tokens[i], self.config.num_draft_tokens, room)
            if place is None or limit < 1:
                continue
            last = len(known) - 2  # the pair with the last known token
            spans.append(Span(row, last, last + 1))
            places.append(place)
            wanted.append(i)
            limits.append(limit)
        if not spans or self._hidden is None:
            return DraftTokens(drafts)
        index = torch.tensor(places, device=self._hidden.device)
        model.features = self._hidden[index]
        rows = [span.row for span in spans]
        ends = [span.end + 1 for span in spans]
        draws = DraftDraws(binding.table, rows, ends, binding.reads_probs)
        logits = runner.logits(model.features, None)
        tokens = runner.draft_from(spans, logits, max(limits), draws.draw).tolist()
        found = draws.probs()
        probs: list[torch.Tensor | None] | None = None
        if found is not None:
            probs = [None] * len(drafts)
        for k, (i, limit) in enumerate(zip(wanted, limits, strict=True)):
            drafts[i] = tokens[k][:limit]
            self._drafted_tokens += limit
            if probs is not None and found is not None:
                probs[i] = found[k]
        return DraftTokens(drafts, probs)

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
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = 0
        if self._runner is not None:
            self._passes_before = self._runner.num_passes
            self._tokens_before = self._runner.num_tokens


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
