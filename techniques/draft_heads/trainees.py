"""What is trained: each kind of head behind one interface, with its options and its loss.

In all of them step ``s`` at base ``j`` knows the hidden state behind token ``j`` and token
``j + 1``, and guesses token ``j + 2 + s``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from techniques.draft_heads.eagle import EagleModule
from techniques.draft_heads.medusa import MedusaHead
from techniques.draft_heads.spec import HeadSpec, eagle3_layers
from techniques.draft_heads.target import HiddenStates, Target
from workbench.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MedusaOptions:
    """Options of :class:`TrainMedusa`.

    Attributes
    ----------
    num_heads, num_layers
        Heads, and residual blocks a head.
    shares_lm_head
        End in the target's output layer instead of one a head.
    draft_vocab_size
        Ids that can be proposed, those that the target wrote most often; 0 takes all.
    decay
        Weight of a head's loss over that of the head before.
    """

    num_heads: int = 4
    num_layers: int = 1
    shares_lm_head: bool = False
    draft_vocab_size: int = 8192
    decay: float = 0.8


@dataclass(frozen=True, slots=True)
class EagleOptions:
    """Options of :class:`TrainEagle`.

    Attributes
    ----------
    num_unroll
        Steps of its own outputs that it is trained on: EAGLE trains one.
    token_weight, feature_weight
        Of the loss of its guesses and of that of its features, in which EAGLE follows the target's
        hidden states.
    decay
        Weight of a step's loss over that of the step before.
    intermediate_size
        Of its feed-forward block; 0 takes the target's.
    """

    num_unroll: int = 1
    token_weight: float = 0.1
    feature_weight: float = 1.0
    decay: float = 0.8
    intermediate_size: int = 0


@dataclass(frozen=True, slots=True)
class Eagle3Options:
    """Options of :class:`TrainEagle3`.

    Attributes
    ----------
    num_unroll
        Steps of its own outputs that it is trained on (training-time test).
    draft_vocab_size
        Ids that can be proposed, those that the target wrote most often; 0 takes all.
    decay
        Weight of a step's loss over that of the step before.
    intermediate_size
        Of its feed-forward block; 0 takes the target's.
    """

    num_unroll: int = 5
    draft_vocab_size: int = 8192
    decay: float = 0.8
    intermediate_size: int = 0


class Trainee(ABC):
    """A kind of head that can be trained."""

    Options: ClassVar[type[Any]]
    options: Any
    #: Steps that the loss covers, and guesses a chain that are measured.
    num_steps: int
    #: Ids that it may propose; 0 takes all.
    draft_vocab_size: int = 0

    def __init__(self, options: Any) -> None:
        self.options = options
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            least = 1 if field.name.startswith("num_") else 0
            if value < least:
                raise ConfigError(f"head.{field.name}={value} must be {least} or more.")

    @abstractmethod
    def spec(self, target: Target, draft_vocab_size: int) -> HeadSpec:
        """The head to train."""

    @abstractmethod
    def make(self, spec: HeadSpec, target: Target, d2t: torch.Tensor | None) -> nn.Module:
        """A head that has learnt nothing yet, in float32 on the target's device."""

    @abstractmethod
    def features(
        self, module: nn.Module, hidden: HiddenStates, token_ids: torch.Tensor, num_steps: int
    ) -> list[torch.Tensor]:
        """What each step's logits are made of, ``[B, S, H]`` each; ``token_ids[B, S + steps]``."""

    @abstractmethod
    def logits(self, module: nn.Module, step: int, features: torch.Tensor) -> torch.Tensor:
        """Logits of a step over the draft vocabulary, ``[..., draft_vocab]`` from ``[..., H]``."""

    def layers(self, spec: HeadSpec) -> tuple[int, ...]:
        """Whose hidden states it reads beside the last."""
        return spec.aux_layers

    def loss(self, logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """Loss ``[B, S]`` of a step's guesses: cross-entropy with what the target gives each id."""
        return -(wanted.probs * F.log_softmax(logits.float(), dim=-1)).sum(-1)

    def feature_loss(self, features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
        """Loss ``[B, S]`` of a step's features ``[B, S, H]`` beside what the target had; None where
        it may have any."""
        return None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step is to guess at each base.

    Attributes
    ----------
    draft_ids : Tensor[B, S] int64
        The token that stands in the text, as an id of the draft vocabulary; 0 where it is none.
    probs : Tensor[B, S, draft_vocab]
        What the target gave each id, over the draft vocabulary.
    """

    draft_ids: torch.Tensor
    probs: torch.Tensor


class TrainMedusa(Trainee):
    """Medusa heads: each learns the token that stands in the text."""

    Options = MedusaOptions
    options: MedusaOptions

    def __init__(self, options: MedusaOptions) -> None:
        super().__init__(options)
        self.num_steps = options.num_heads
        self.draft_vocab_size = options.draft_vocab_size

    def spec(self, target: Target, draft_vocab_size: int) -> HeadSpec:
        return HeadSpec(
            kind="medusa",
            hidden_size=target.spec.hidden_size,
            vocab_size=target.spec.vocab_size,
            draft_vocab_size=draft_vocab_size,
            num_heads=self.options.num_heads,
            num_layers=self.options.num_layers,
            shares_lm_head=self.options.shares_lm_head,
        )

    def make(self, spec: HeadSpec, target: Target, d2t: torch.Tensor | None) -> nn.Module:
        return MedusaHead(spec, target.lm_head(), d2t).float().to(target.decoder.device)

    def features(
        self, module: nn.Module, hidden: HiddenStates, token_ids: torch.Tensor, num_steps: int
    ) -> list[torch.Tensor]:
        return [_as_matrices(hidden.final)] * num_steps

    def logits(self, module: nn.Module, step: int, features: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, MedusaHead)
        return module.logits(step, features)

    def loss(self, logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        rows = logits.float().flatten(0, 1), wanted.draft_ids.flatten()
        return F.cross_entropy(*rows, reduction="none").view_as(wanted.draft_ids)


class TrainUnrolled(Trainee):
    """An EAGLE head of either kind, unrolled on its own features."""

    def make(self, spec: HeadSpec, target: Target, d2t: torch.Tensor | None) -> nn.Module:
        module = EagleModule(spec, target.embedding(), target.lm_head(), d2t)
        return module.float().to(target.decoder.device)

    def features(
        self, module: nn.Module, hidden: HiddenStates, token_ids: torch.Tensor, num_steps: int
    ) -> list[torch.Tensor]:
        assert isinstance(module, EagleModule)
        states = _as_matrices(hidden.kept if module.is_third else hidden.final)
        return module(states, token_ids, num_steps)  # type: ignore[no-any-return]

    def logits(self, module: nn.Module, step: int, features: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, EagleModule)
        return module.logits(features)


class TrainEagle3(TrainUnrolled):
    """EAGLE-3: follows the target's probabilities over as many steps as it drafts."""

    Options = Eagle3Options
    options: Eagle3Options

    def __init__(self, options: Eagle3Options) -> None:
        super().__init__(options)
        self.num_steps = options.num_unroll
        self.draft_vocab_size = options.draft_vocab_size

    def spec(self, target: Target, draft_vocab_size: int) -> HeadSpec:
        layers = eagle3_layers(target.spec.num_layers)
        config = {
            **_llama_config(target, self.options.intermediate_size),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": draft_vocab_size,
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "bias": False,
        }
        return HeadSpec.from_config(config)


class TrainEagle(TrainUnrolled):
    """EAGLE: its features follow the target's hidden states, its guesses the probabilities."""

    Options = EagleOptions
    options: EagleOptions

    def __init__(self, options: EagleOptions) -> None:
        super().__init__(options)
        self.num_steps = options.num_unroll

    def spec(self, target: Target, draft_vocab_size: int) -> HeadSpec:
        config = {
            **_llama_config(target, self.options.intermediate_size),
            "architectures": ["LlamaForCausalLMEagle"],
            "bias": True,
        }
        return HeadSpec.from_config(config)

    def loss(self, logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        return self.options.token_weight * super().loss(logits, wanted)

    def feature_loss(self, features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
        rows = F.smooth_l1_loss(features.float(), wanted.float(), reduction="none").mean(-1)
        return self.options.feature_weight * rows


def _as_matrices(states: torch.Tensor) -> torch.Tensor:
    """Outside autocast matrices are float32, and a target's states may not be."""
    return states if torch.is_autocast_enabled(states.device.type) else states.float()


def _llama_config(target: Target, intermediate_size: int) -> Mapping[str, Any]:
    """A Llama of one layer whose attention is shaped like the target's."""
    spec = target.spec
    layer = spec.layers[-1]
    return {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": intermediate_size or spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_kv_heads,
        "head_dim": layer.attention.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": layer.rope.theta,
        "hidden_act": "silu",
        "initializer_range": spec.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
