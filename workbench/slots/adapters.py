"""Slot ``adapters``: low-rank updates that requests bring with them."""

from __future__ import annotations

from abc import abstractmethod

import torch

from workbench.core.step import ForwardBatch
from workbench.slots.component import Component
from workbench.slots.linear import LinearLayer


class Adapters(Component):
    """Adds each request's adapter to the output of the linear layers."""

    #: Whether ``apply`` changes anything, so that the model may leave the call out.
    active: bool = False

    @abstractmethod
    def load(self, adapter_id: str) -> None:
        """Make an adapter available, or raise naming the ones that are."""

    @abstractmethod
    def slots_for(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Adapter slot of each token ``[T]``, or None where no request has one."""

    @abstractmethod
    def apply(self, layer: LinearLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y + B A x`` for each token's adapter; may write to ``y``."""


class NoAdapters(Adapters):
    """No adapters: the null object."""

    def load(self, adapter_id: str) -> None:
        raise ValueError(
            f"adapter {adapter_id!r} cannot be loaded: the engine was built without adapters."
        )

    def slots_for(self, batch: ForwardBatch) -> torch.Tensor | None:
        return None

    def apply(self, layer: LinearLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y
