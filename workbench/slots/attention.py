"""Slot ``attention``: queries against the paged KV pool."""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import kernels
from kernels.attention import Implementation
from kernels.tree_attention import Tree, tree_rows
from workbench.core.step import ForwardBatch
from workbench.slots.component import Component
from workbench.slots.kv_pool import KVPool


class CudaGraphSupport(enum.IntEnum):
    """What batches a backend can run inside a captured graph, weakest first."""

    NEVER = 0
    UNIFORM_SINGLE_TOKEN = 1
    UNIFORM_BATCH = 2
    ALWAYS = 3


#: Name of the form of a prepared step that serves every batch.
PLAIN_FORM = ""


@dataclass(frozen=True, slots=True)
class StepForm:
    """A form in which steps of single tokens are prepared beside the plain one, for batches that
    an attention backend serves better in another way.

    Attributes
    ----------
    name
        Not :data:`PLAIN_FORM`.
    granularity
        Its sizes are the multiples of it.
    """

    name: str
    granularity: int


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What a backend must know of one attention layer.

    Attributes
    ----------
    scale
        Factor on the dot products.
    sliding_window
        Tokens a query sees, itself included; None sees all.
    soft_cap
        ``soft_cap * tanh(score / soft_cap)`` on the scores; None leaves them.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class TokenTrees:
    """Trees of a batch, in ``ForwardBatch.extras``. A node sees the known tokens, the nodes that
    lead to it, and itself; its position is that of its depth, its slot that of its place.

    Attributes
    ----------
    trees
        Of the requests that have one.
    tensors
        What :func:`kernels.tree_attention.tree_rows` makes of them, on the device: for all layers
        but those of a sliding window that is shorter than a tree is deep, which add theirs.
    """

    trees: Sequence[Tree]
    tensors: dict[int | None, torch.Tensor]


def tree_of(batch: ForwardBatch, sliding_window: int | None) -> torch.Tensor | None:
    """The batch's trees as kernels read them (:mod:`kernels.tree_attention`); None without any."""
    trees: TokenTrees | None = batch.extras.get(TokenTrees)
    if trees is None:
        return None
    deepest = max(len(tree.parents) for tree in trees.trees)
    window = sliding_window if sliding_window is not None and sliding_window < deepest else None
    if window not in trees.tensors:  # shorter than a tree is deep: the first such layer makes it
        rows = torch.from_numpy(tree_rows(trees.trees, batch.num_tokens, window))
        trees.tensors[window] = rows.to(batch.input_ids.device)
    return trees.tensors[window]


class AttentionBackend(Component):
    """Computes attention over what the KV pool holds. Never writes to the pool."""

    cudagraph_support: CudaGraphSupport = CudaGraphSupport.NEVER
    #: Whether tokens of a request may be a tree (``TokenTrees`` among the batch's extras).
    supports_trees: bool = False

    def describe(self) -> str:
        """What serves, for tables and records: the class, and what it chose."""
        return type(self).__name__

    @abstractmethod
    def build_metadata(self, batch: ForwardBatch) -> Any:
        """Prepare what all layers of this step share. Called once a step, may use host lists of
        the batch, must not wait for the device."""

    @abstractmethod
    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: Any, pool: KVPool
    ) -> torch.Tensor:
        """Causal attention of ``q[T, Hq, D]`` over each request's context; ``[T, Hq, D]``.

        The KV of this step's own tokens is in the pool already.
        """

    @abstractmethod
    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        """Why this backend cannot serve the model here; empty when it can."""

    # -- prepared steps -----------------------------------------------------------------------

    def step_forms(self, batch: ForwardBatch) -> tuple[StepForm, ...]:
        """Forms of prepared steps beside the plain one; called once, with the largest of them.

        What such a form reads of a batch beside its tensors must lie on the device at addresses
        that never change, and say at first that there is nothing.
        """
        return ()

    def prepared_metadata(self, batch: ForwardBatch, form: str) -> Any:
        """As :meth:`build_metadata`, for a step that will run again and again in this form: of the
        batch's host lists, nothing but how many requests there are may be used."""
        return self.build_metadata(batch)

    def choose_form(self, batch: ForwardBatch) -> str:
        """The form in which this batch runs, while its requests stay the same; called before the
        first step of it, with host lengths of that step. Writes to the device, in the order of its
        steps, what the form reads. Its prepared steps may still run in the plain form."""
        return PLAIN_FORM

    def note_prepared(self, form: str) -> None:
        """Count one step that runs in this form, of the batch that was last shown."""


class SdpaAttention(AttentionBackend):
    """The reference: torch's scaled dot-product attention over gathered blocks, on every device,
    with the CPU's own paged kernel where ``kernels`` has one. The null object."""

    supports_trees = True

    def build_metadata(self, batch: ForwardBatch) -> ForwardBatch:
        return batch

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: ForwardBatch, pool: KVPool
    ) -> torch.Tensor:
        k_cache, v_cache = pool.layer(layer.index)
        implementation: Implementation = "auto"  # on the CPU
        if q.is_cuda:
            implementation = "sdpa" if layer.soft_cap is None else "reference"
        return kernels.paged_attend(
            q,
            k_cache,
            v_cache,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=layer.scale,
            sliding_window=layer.sliding_window,
            soft_cap=layer.soft_cap,
            query_lens=metadata.query_lens_host,
            seq_lens_list=metadata.seq_lens_host,
            tree=tree_of(metadata, layer.sliding_window),
            implementation=implementation,
        )

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        return []


@dataclass(frozen=True, slots=True)
class KeptHidden:
    """Hidden states that a forward pass is to keep, for heads that read them.

    Attributes
    ----------
    layers
        Where: ``i`` is the residual stream that enters layer ``i``, with the output of the ``i``
        layers before it; the number of layers is what leaves the last, before the final norm.
    states : dict[int, Tensor[T, H]]
        Copies, by where; filled by the pass.
    """

    layers: frozenset[int]
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def offer(self, index: int, residual: torch.Tensor) -> None:
        """Copy ``residual[T, H]``, which goes on to be added to in place, if it is wanted."""
        if index in self.layers:
            self.states[index] = residual.clone()


@dataclass(slots=True)
class ForwardContext:
    """What the layers of a model need beside hidden states, for one forward pass."""

    batch: ForwardBatch
    attention: AttentionBackend
    metadata: Any
    pool: KVPool
    kept: KeptHidden | None = None
