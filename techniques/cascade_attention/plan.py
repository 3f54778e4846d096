"""The groups of a batch as tensors on the device: made for one step, or kept for prepared ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from techniques.cascade_attention.groups import PrefixGroup
from workbench.core.step import ForwardBatch
from workbench.engine.upload import upload, upload_into

_ALIGNMENT = 4  # int32: pieces of one tensor start at multiples of 16 bytes, as kernels like them


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


def group_tensors(batch: ForwardBatch, groups: list[PrefixGroup]) -> GroupTensors:
    """Groups of one step, of any queries, on the device in one copy."""
    table = batch.host_block_table()
    starts = np.cumsum([0, *batch.query_lens_host])
    tokens = [
        [np.arange(starts[member], starts[member + 1]) for member in group.members]
        for group in groups
    ]
    blocks = np.zeros((len(groups), max(group.num_blocks for group in groups)), np.int32)
    prefix_lens, key_start = _fill(blocks, table, groups, batch.num_requests, batch.block_size)
    lengths = [sum(map(len, parts)) for parts in tokens]
    pieces = [
        blocks.ravel(),
        prefix_lens,
        np.concatenate([part for parts in tokens for part in parts]),
        np.cumsum([0, *lengths]),
        key_start,
    ]
    packed, begins = _pack(pieces)
    whole = upload(packed, batch.block_table.device, torch.int32)
    return _views(whole, begins, [len(piece) for piece in pieces], blocks.shape[1])


class PlanBuffers:
    """Groups of single tokens in tensors of fixed address and largest size, for captured steps.

    Entries past the groups that there are say that there is nothing: prefixes without a token, and
    requests without a group. A kernel learns from ``group_start_loc``, on the device, where the
    used ones end.

    Parameters
    ----------
    num_requests, num_columns
        Most requests of a step, and blocks of one.
    max_groups
        Groups that fit.
    """

    def __init__(
        self, num_requests: int, num_columns: int, max_groups: int, device: torch.device
    ) -> None:
        self.max_groups = max_groups
        self._blocks = np.zeros((max_groups, num_columns), np.int32)
        self._sizes = [self._blocks.size, max_groups, num_requests, max_groups + 1, num_requests]
        packed, begins = _pack([np.zeros(size, np.int32) for size in self._sizes])
        self._whole = torch.from_numpy(packed).to(device)
        self._begins = begins

    def write(self, batch: ForwardBatch, groups: Sequence[PrefixGroup]) -> None:
        """Hold these groups of a batch of single tokens from now on, in the order of its steps."""
        assert len(groups) <= self.max_groups
        _, num_lens, num_tokens, num_starts, num_requests = self._sizes
        self._blocks.fill(0)
        lens, key_start = _fill(
            self._blocks, batch.host_block_table(), groups, num_requests, batch.block_size
        )
        prefix_lens = np.zeros(num_lens, np.int32)
        prefix_lens[: len(groups)] = lens
        token_index = np.zeros(num_tokens, np.int32)
        members = [member for group in groups for member in group.members]
        token_index[: len(members)] = members
        start_loc = np.full(num_starts, len(members), np.int32)
        start_loc[: len(groups) + 1] = np.cumsum([0, *(len(group.members) for group in groups)])
        pieces = [self._blocks.ravel(), prefix_lens, token_index, start_loc, key_start]
        upload_into(self._whole, _pack(pieces)[0])

    def tensors(self, num_requests: int) -> GroupTensors:
        """Views for a step of so many requests, padding included."""
        blocks, groups, _, starts, _ = self._sizes
        sizes = [blocks, groups, num_requests, starts, num_requests]
        return _views(self._whole, self._begins, sizes, self._blocks.shape[1])


def _fill(
    blocks: np.ndarray,
    table: np.ndarray,
    groups: Sequence[PrefixGroup],
    num_requests: int,
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Write each group's blocks into ``blocks``; the prefixes' lengths, and each request's."""
    key_start = np.zeros(num_requests, np.int32)
    for row, group in zip(blocks, groups, strict=False):
        row[: group.num_blocks] = table[group.members[0], : group.num_blocks]
        key_start[list(group.members)] = group.num_blocks * block_size
    return np.array([group.num_blocks * block_size for group in groups], np.int32), key_start


def _pack(pieces: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Pieces in one int32 array, and where each begins."""
    padded = [-(-len(piece) // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
    begins: list[int] = np.cumsum([0, *padded]).tolist()
    packed = np.zeros(begins[-1], np.int32)
    for begin, piece in zip(begins, pieces, strict=False):
        packed[begin : begin + len(piece)] = piece
    return packed, begins[:-1]


def _views(
    whole: torch.Tensor, begins: list[int], sizes: list[int], num_columns: int
) -> GroupTensors:
    """The pieces of :func:`_pack` where they lie."""
    table, lens, index, start_loc, key_start = (
        whole[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)
    )
    return GroupTensors(table.view(-1, num_columns), lens, index, start_loc, key_start)
