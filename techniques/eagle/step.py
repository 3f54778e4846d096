"""Drafting with an EAGLE head as work of the device alone."""

from __future__ import annotations

from typing import ClassVar

import torch

from techniques.eagle.model import HeadModel
from workbench.engine.draft_runner import DraftRunner
from workbench.engine.draft_step import DraftStep
from workbench.engine.prepared_step import StepParts
from workbench.slots.attention import PLAIN_FORM


class EagleStep(DraftStep):
    """Drafts after the last known token of each place, from the target's hidden state behind it.

    Attributes
    ----------
    features : Tensor[B, H]
        What each place starts from; beside the places all that changes from outside.
    """

    ids_ahead: ClassVar[int] = 1

    def __init__(
        self,
        parts: StepParts,
        runner: DraftRunner,
        model: HeadModel,
        max_size: int,
        num_drafts: int,
    ) -> None:
        width = model.layer.hidden_size
        device = parts.table.device
        self.features = torch.zeros(max_size, width, dtype=model.features_dtype, device=device)
        self._model = model
        super().__init__(parts, runner, max_size, 1, num_drafts)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.features.nbytes

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        self._model.features = self.features[:size]
        super().run(size, form)

    def likeliest(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return self._model.likeliest(hidden if index is None else hidden[index])
