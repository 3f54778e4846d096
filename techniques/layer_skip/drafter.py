"""Drafts by the target's first layers and its head."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from workbench.core.errors import ConfigError
from workbench.engine.draft_runner import DraftRunner, Span
from workbench.engine.model_drafter import ModelDrafter, ModelDrafterConfig
from workbench.models.decoder import Decoder
from workbench.slots.drafter import DrafterBinding, DrafterHost


@dataclass(frozen=True, slots=True)
class LayerSkipConfig(ModelDrafterConfig):
    """Options of :class:`LayerSkip`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    num_layers
        Layers that draft, the first of the target's; 0 takes a third of them.
    """

    num_draft_tokens: int = 4
    num_layers: int = 0


class LayerSkip(ModelDrafter):
    """Leaves the target early.

    No weights and no KV of its own: the layers that draft have written the KV of every known token
    but the last when they ran for the target, in the same slots, and what they write of drafts the
    verification writes again.
    """

    Config = LayerSkipConfig
    config: LayerSkipConfig

    def __init__(self, config: LayerSkipConfig) -> None:
        super().__init__(config)
        self._model: Decoder | None = None

    def load(self, host: DrafterHost) -> None:
        target: Decoder = host.target
        there, wanted = len(target.layers), self.config.num_layers
        if not 0 <= wanted < there:
            raise ConfigError(
                f"engine.drafter.num_layers={wanted} must be 1 to {there - 1}, fewer than the "
                f"target's {there} layers, or 0 for a third of them."
            )
        self._model = copy.copy(target)  # the weights are the target's
        self._model.layers = target.layers[: wanted or max(1, there // 3)]
        self.max_positions = target.spec.max_position_embeddings

    def make_runner(self, binding: DrafterBinding) -> DraftRunner:
        model = self._model
        assert model is not None, "a drafter is loaded before it is bound"
        layers = model.spec.attention_layers[: len(model.layers)]
        pool = binding.target_pool
        return DraftRunner(
            model, binding.table, pool, binding.make_attention(layers, pool), binding.vocab_size
        )

    def num_run(self, request_id: str, row: int, known: np.ndarray) -> int:
        return len(known) - 1

    def note_run(self, request_id: str, span: Span, drafts: list[int]) -> None: ...
