"""Slot ``parallel``: how a model is spread over devices."""

from __future__ import annotations

from abc import abstractmethod

import torch

from workbench.slots.component import Component


class Parallel(Component):
    """A plan over named axes and the one communicator that serves it."""

    #: Size by axis (``tp``, ``pp``, ``dp``, ``ep``); an axis that is missing has size 1.
    axes: dict[str, int]

    @abstractmethod
    def rank(self, axis: str) -> int:
        """This process's place on an axis."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Sum over an axis; may write to ``x``."""


class SingleDevice(Parallel):
    """Everything on one device: the null object."""

    axes: dict[str, int] = {}  # noqa: RUF012 - never written

    def rank(self, axis: str) -> int:
        return 0

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        return x
