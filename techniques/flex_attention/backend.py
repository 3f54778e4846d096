"""FlexAttention with a paged block mask.

Keys and values are the whole pool, seen as one sequence of slots. A map from a request's blocks to
their place in its sequence turns a slot into a position, so that masking can speak of positions;
the block mask lists the blocks that a tile of queries has to visit. No page is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from techniques.attention import (
    CountingAttention,
    Phase,
    capability_reasons,
    dtype_reasons,
    head_dim_reasons,
    phase_of,
    quantized_reasons,
)
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionLayer
from workbench.slots.kv_pool import KVPool

_QUERY_TILE = 128
#: The compiled kernel multiplies tiles of keys, and a tile lies in one block.
_LEAST_BLOCK_SIZE = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Mask = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class FlexAttentionConfig:
    """Options of :class:`FlexAttention`.

    Attributes
    ----------
    compile_on_gpu
        Use torch.compile on a GPU, which is what makes it fast; without, scores are written out.
        On a CPU it never compiles.
    """

    compile_on_gpu: bool = True


@dataclass(slots=True)
class _Group:
    """Requests that one call serves, their queries padded to one length.

    Attributes
    ----------
    tokens : Tensor [R, Q] int64
        Where in the batch each query is; padding repeats the request's last one.
    take : Tensor [R, Q] bool, or None
        Which of them are no padding; None where all are.
    block_of_page : Tensor [R, num_blocks + 1] int32
        Place of a block of the pool in the request's sequence; -1 for others' blocks.
    context : Tensor [R] int64
        Position of the first query.
    """

    tokens: torch.Tensor
    take: torch.Tensor | None
    block_of_page: torch.Tensor
    context: torch.Tensor
    num_pages: torch.Tensor
    pages: torch.Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict)


@dataclass(slots=True)
class FlexMetadata:
    """The groups of a step, and the block size of its pool."""

    phase: Phase
    block_size: int
    num_slots: int
    groups: list[_Group]


class FlexAttention(CountingAttention):
    """Single tokens in one call and everything else, padded to the longest, in another."""

    Config = FlexAttentionConfig

    def __init__(self, config: FlexAttentionConfig | None = None) -> None:
        super().__init__(config)
        self._num_blocks = 0
        self._attend: Any = flex_attention
        self._tiles: dict[str, int] | None = None

    def build_metadata(self, batch: ForwardBatch) -> FlexMetadata:
        lens = batch.query_lens_host
        singles = [row for row, count in enumerate(lens) if count == 1]
        others = [row for row, count in enumerate(lens) if count > 1]
        groups = [self._group(batch, rows) for rows in (singles, others) if rows]
        num_slots = (self._num_blocks + 1) * batch.block_size
        return FlexMetadata(phase_of(batch), batch.block_size, num_slots, groups)

    def _group(self, batch: ForwardBatch, rows: list[int]) -> _Group:
        device = batch.block_table.device
        longest = max(batch.query_lens_host[row] for row in rows)
        if longest > 1:  # few different lengths, few different shapes to compile for
            longest = -(-longest // _QUERY_TILE) * _QUERY_TILE
        index = torch.tensor(rows).to(device, non_blocking=True)
        first = batch.query_start_loc[index].long().unsqueeze(1)
        counts = batch.query_start_loc[index + 1].long().unsqueeze(1) - first
        column = torch.arange(longest, device=device)
        seq_lens = batch.seq_lens[index].long()
        num_pages = -(-seq_lens // batch.block_size)
        table = batch.block_table[index].long()
        place = torch.arange(table.shape[1], device=device)
        is_own = place < num_pages.unsqueeze(1)
        # Entries past a request's end may be anything: they go to one column more, cut off below.
        pages = torch.where(is_own, table, self._num_blocks + 1)
        blocks = torch.full((len(rows), self._num_blocks + 2), -1, dtype=torch.int32, device=device)
        blocks.scatter_(1, pages, place.to(torch.int32).expand_as(pages))
        return _Group(
            tokens=first + torch.minimum(column, counts - 1),
            take=None if longest == 1 else column < counts,
            block_of_page=blocks[:, :-1],
            context=seq_lens - counts.squeeze(1),
            num_pages=num_pages,
            pages=torch.where(is_own, table, 0).to(torch.int32),
        )

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: FlexMetadata, pool: KVPool
    ) -> torch.Tensor:
        self.count(metadata.phase)
        k, v = (cache.flatten(0, 1).transpose(0, 1)[None] for cache in pool.layer(layer.index))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in metadata.groups:
            result = self._attend(
                q[group.tokens].transpose(1, 2),
                k,
                v,
                score_mod=None if layer.soft_cap is None else _soft_cap(layer.soft_cap, q.device),
                block_mask=self._mask(group, metadata, layer.sliding_window),
                scale=layer.scale,
                enable_gqa=True,
                kernel_options=None if group.take is None else self._tiles,
            ).transpose(1, 2)
            if group.take is None:
                out[group.tokens[:, 0]] = result[:, 0]
            else:
                # Padding repeats a request's last query, and what it writes there is the same.
                out[group.tokens] = result
        return out

    def _mask(self, group: _Group, metadata: FlexMetadata, window: int | None) -> BlockMask:
        """The mask of a group, made once a step for each window in the model."""
        if window not in group.masks:
            requests, num_queries = group.tokens.shape
            tiles = -(-num_queries // _QUERY_TILE)
            counts = group.num_pages.to(torch.int32)[:, None, None].expand(-1, 1, tiles)
            indices = group.pages[:, None, None, :].expand(-1, 1, tiles, -1)
            group.masks[window] = BlockMask.from_kv_blocks(
                counts.contiguous(),
                indices.contiguous(),
                BLOCK_SIZE=(_QUERY_TILE, metadata.block_size),
                mask_mod=_sees(group, metadata.block_size, window),
                seq_lengths=(num_queries, metadata.num_slots),
                compute_q_blocks=False,
            )
            assert group.masks[window].shape[0] == requests
        return group.masks[window]

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        self._num_blocks = pool.num_blocks
        is_compiled = pool.layer(0)[0].device.type == "cuda" and self.config.compile_on_gpu
        self._attend = _compiled() if is_compiled else flex_attention
        # A tile of keys lies in one block; for single queries torch sees to that by itself.
        tile = min(64, pool.block_size)
        self._tiles = {"BLOCK_M": 64, "BLOCK_N": tile} if is_compiled else None
        reasons = [
            *capability_reasons(pool, (8, 0)),
            *dtype_reasons(pool, _DTYPES),
            *quantized_reasons(pool),
        ]
        if is_compiled:
            reasons += head_dim_reasons(layers, most=256)
            if pool.block_size < _LEAST_BLOCK_SIZE or pool.block_size & (pool.block_size - 1):
                reasons.append(
                    f"block size {pool.block_size} is not a power of two of at least"
                    f" {_LEAST_BLOCK_SIZE}, which the compiled kernel needs (compile_on_gpu=false"
                    " takes any)"
                )
        return reasons


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _soft_cap(cap: float, device: torch.device) -> Mask:
    at = torch.tensor(cap, device=device)  # a number would become a symbol, which compiles to none

    def cap_score(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return at * torch.tanh(score / at)

    return cap_score


def _sees(group: _Group, block_size: int, window: int | None) -> Mask:
    block_of_page, context = group.block_of_page, group.context
    last = group.tokens - group.tokens[:, :1]  # which query of its request each one is

    def sees(
        request: torch.Tensor, head: torch.Tensor, query: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        block = block_of_page[request, slot // block_size]
        key = block * block_size + slot % block_size
        position = context[request] + last[request, query]
        seen = (block >= 0) & (key <= position)
        return seen if window is None else seen & (key > position - window)

    return sees
