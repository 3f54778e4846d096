"""Paged attention that reads a prefix once for all requests of a batch that share its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import kernels
from kernels import triton
from kernels.shared_prefix import cascade_attend
from techniques.attention import (
    capability_reasons,
    dtype_reasons,
    head_dim_reasons,
    quantized_reasons,
)
from techniques.cascade_attention.groups import PrefixGroup, find_groups
from workbench.core.errors import ConfigError
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionBackend, AttentionLayer
from workbench.slots.kv_pool import KVPool

_ALIGNMENT = 4  # int32: pieces of one tensor start at multiples of 16 bytes, as kernels like them


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """Options of :class:`CascadeAttention`.

    Attributes
    ----------
    min_requests
        Requests that must share a prefix.
    min_shared_tokens
        Tokens that it must have.
    """

    min_requests: int = 4
    min_shared_tokens: int = 256


@dataclass(frozen=True, slots=True)
class GroupTensors:
    """The groups of a batch as :func:`kernels.shared_prefix.cascade_attend` takes them, int32.

    Attributes
    ----------
    group_block_table : Tensor[G, P]
    prefix_lens : Tensor[G]
    token_index : Tensor[N]
    group_start_loc : Tensor[G + 1]
    key_start : Tensor[B]
    """

    group_block_table: torch.Tensor
    prefix_lens: torch.Tensor
    token_index: torch.Tensor
    group_start_loc: torch.Tensor
    key_start: torch.Tensor


@dataclass(frozen=True, slots=True)
class CascadeMetadata:
    """A batch, and its groups where there are any."""

    batch: ForwardBatch
    groups: list[PrefixGroup]
    tensors: GroupTensors | None
    max_query_len: int


class CascadeAttention(AttentionBackend):
    """Attention of a group's queries to their shared prefix in one pass without a mask, attention
    of each request to what follows it in another, joined exactly by their log-sum-exps.

    Groups are found by the block tables alone: whatever shares blocks shares a prefix. Layers with
    a sliding window, and batches without a group, take the plain kernel.
    """

    Config = CascadeConfig
    config: CascadeConfig

    def __init__(self, config: CascadeConfig | None = None) -> None:
        super().__init__(config)
        if self.config.min_requests < 2 or self.config.min_shared_tokens < 1:
            raise ConfigError(
                f"attention.min_requests={self.config.min_requests} must be 2 or more, and "
                f"min_shared_tokens={self.config.min_shared_tokens} 1 or more."
            )
        self._last: CascadeMetadata | None = None
        self.reset_counters()

    def build_metadata(self, batch: ForwardBatch) -> CascadeMetadata:
        # While the same requests decode, their batch is one object and only their ends grow.
        if self._last is None or self._last.batch is not batch:
            groups = self._find(batch)
            tensors = _tensors(batch, groups) if groups else None
            self._last = CascadeMetadata(batch, groups, tensors, batch.max_query_len)
        self._count(self._last)
        return self._last

    def _find(self, batch: ForwardBatch) -> list[PrefixGroup]:
        if batch.num_requests < self.config.min_requests:
            return []
        # Of the tokens before this step alone: others may be writing the rest in it.
        num_complete = [
            (length - queries) // batch.block_size
            for length, queries in zip(batch.seq_lens_host, batch.query_lens_host, strict=True)
        ]
        return find_groups(
            batch.host_block_table(),
            num_complete,
            min_requests=self.config.min_requests,
            min_blocks=-(-self.config.min_shared_tokens // batch.block_size),
        )

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: CascadeMetadata, pool: KVPool
    ) -> torch.Tensor:
        k_cache, v_cache = pool.layer(layer.index)
        batch, groups = metadata.batch, metadata.tensors
        if groups is None or layer.sliding_window is not None:
            return kernels.paged_attend(
                q,
                k_cache,
                v_cache,
                batch.block_table,
                batch.query_start_loc,
                batch.seq_lens,
                scale=layer.scale,
                sliding_window=layer.sliding_window,
                soft_cap=layer.soft_cap,
                query_lens=batch.query_lens_host,
                seq_lens_list=batch.seq_lens_host,
            )
        return cascade_attend(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.query_start_loc,
            batch.seq_lens,
            layer.scale,
            group_block_table=groups.group_block_table,
            prefix_lens=groups.prefix_lens,
            token_index=groups.token_index,
            group_start_loc=groups.group_start_loc,
            key_start=groups.key_start,
            soft_cap=layer.soft_cap,
            max_query_len=metadata.max_query_len,
        )

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        reasons = []
        if layers and all(layer.sliding_window is not None for layer in layers):
            window = max(layer.sliding_window or 0 for layer in layers)
            reasons.append(
                f"every layer has a sliding window (of {window} tokens at most), so that a shared "
                "prefix is soon out of sight; choose another engine/attention, such as sdpa"
            )
        cache = pool.layer(0)[0]
        if cache.is_cuda:
            missing = triton.unsupported_reason(cache)
            reasons += [missing] if missing else []
            reasons += capability_reasons(pool, (8, 0))
            reasons += dtype_reasons(pool, triton.DTYPES)
            reasons += head_dim_reasons(layers, most=triton.MAX_HEAD_DIM)
        return [*reasons, *quantized_reasons(pool)]

    # -- counters -----------------------------------------------------------------------------

    def _count(self, metadata: CascadeMetadata) -> None:
        counts, size = self._counts, metadata.batch.block_size
        counts["steps_with_groups"] += bool(metadata.groups)
        for group in metadata.groups:
            counts["prefix_groups"] += 1
            counts["grouped_requests"] += len(group.members)
            counts["prefix_tokens_read"] += group.num_blocks * size
            counts["prefix_tokens_saved"] += group.saved_blocks * size

    def counters(self) -> dict[str, float]:
        return dict(self._counts)

    def reset_counters(self) -> None:
        names = (
            "steps_with_groups",
            "prefix_groups",
            "grouped_requests",
            "prefix_tokens_read",
            "prefix_tokens_saved",
        )
        self._counts: dict[str, int] = dict.fromkeys(names, 0)


def _tensors(batch: ForwardBatch, groups: list[PrefixGroup]) -> GroupTensors:
    """Groups on the device, in one copy."""
    table, size = batch.host_block_table(), batch.block_size
    starts = np.cumsum([0, *batch.query_lens_host])
    tokens = [
        [np.arange(starts[member], starts[member + 1]) for member in group.members]
        for group in groups
    ]
    blocks = np.zeros((len(groups), max(group.num_blocks for group in groups)), np.int32)
    key_start = np.zeros(batch.num_requests, np.int32)
    for row, group in zip(blocks, groups, strict=True):
        row[: group.num_blocks] = table[group.members[0], : group.num_blocks]
        key_start[list(group.members)] = group.num_blocks * size
    lengths = [sum(map(len, parts)) for parts in tokens]
    pieces = [
        blocks.ravel(),
        np.array([group.num_blocks * size for group in groups]),
        np.concatenate([part for parts in tokens for part in parts]),
        np.cumsum([0, *lengths]),
        key_start,
    ]
    table_of, lens, index, start_loc, first_key = _to_device(pieces, batch.block_table.device)
    return GroupTensors(table_of.view(blocks.shape), lens, index, start_loc, first_key)


def _to_device(pieces: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Pieces as int32 tensors, views of one that is copied once."""
    padded = [-(-len(piece) // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
    begins = np.cumsum([0, *padded])
    packed = np.zeros(begins[-1], np.int32)
    for begin, piece in zip(begins, pieces, strict=False):
        packed[begin : begin + len(piece)] = piece
    whole = torch.from_numpy(packed).to(device, non_blocking=True)
    return [whole[a : a + len(piece)] for a, piece in zip(begins, pieces, strict=False)]
