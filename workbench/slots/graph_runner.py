"""Slot ``graph_runner``: how a forward pass is launched."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench.core.step import ForwardBatch
from workbench.slots.component import Component


@dataclass(frozen=True, slots=True)
class BatchDescriptor:
    """Shape under which a forward pass is captured and found again.

    ``num_tokens`` and ``num_requests`` are padded sizes; ``mode`` is what runs it.
    """

    num_tokens: int
    num_requests: int
    uniform_query_len: int | None
    mode: str


class GraphRunner(Component):
    """Runs ``forward(batch) -> hidden[T, H]``, padding to a captured shape where it has one.

    Padding points at the trash block, so that padded rows change nothing.
    """

    @abstractmethod
    def dispatch(self, batch: ForwardBatch) -> BatchDescriptor:
        """Choose the shape that a batch runs under."""

    @abstractmethod
    def capture(self, descriptors: list[BatchDescriptor]) -> None:
        """Prepare shapes ahead of the first request."""

    @abstractmethod
    def run(
        self,
        descriptor: BatchDescriptor,
        batch: ForwardBatch,
        forward: Callable[[ForwardBatch], torch.Tensor],
    ) -> torch.Tensor:
        """Run under the descriptor; hidden states of the batch's own tokens, ``[T, H]``."""


class EagerRunner(GraphRunner):
    """Calls the model as it is: the null object."""

    def dispatch(self, batch: ForwardBatch) -> BatchDescriptor:
        return BatchDescriptor(batch.num_tokens, batch.num_requests, None, "eager")

    def capture(self, descriptors: list[BatchDescriptor]) -> None: ...

    def run(
        self,
        descriptor: BatchDescriptor,
        batch: ForwardBatch,
        forward: Callable[[ForwardBatch], torch.Tensor],
    ) -> torch.Tensor:
        return forward(batch)
