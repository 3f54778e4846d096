"""How decode attention cuts its work, by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(slots=True, frozen=True)
class DecodeTiling:
    """How the work is cut.

    Attributes
    ----------
    block_n : int
        Keys a step.
    num_warps, num_stages : int
        Of a program, and of its pipeline of loads.
    programs_per_multiprocessor : int
        Pieces to aim at, all requests and heads together, for each multiprocessor.
    min_share : int
        Steps: a program takes no fewer, so that short requests are not cut up.
    max_tile_rows : int
        Queries, by heads of the group, that a program has at most, a power of two from 16 on.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    min_share: int = 2
    max_tile_rows: int = 64


def choose_tiling(
    head_dim: int,
    cache_dtype: torch.dtype,
    max_rows: int,
    *,
    is_few: bool,
    has_token_scales: bool,
    are_tiles_few: bool = False,
) -> DecodeTiling:
    """The tiling that an H100 liked best for such a cache (experiments/gpu_attention.py).

    As many programs as are resident at a time: any more would wait for a whole share to end. With
    few requests (``is_few``: fewer pairs of a request and a KV head than multiprocessors) every
    request is cut up, and fewer, larger programs leave fewer pieces to merge. Are also tiles of 16
    rows few (``are_tiles_few``), each tile of a request has programs of its own: the kernel is as
    long as a program, and a product of 32 rows takes far longer than one of 16.
    """
    row_bytes = triton.next_power_of_2(head_dim) * cache_dtype.itemsize
    if cache_dtype == torch.float32:
        return DecodeTiling(32 if row_bytes <= 512 else 16, 4, 2, 2)
    if cache_dtype.itemsize == 1:
        block_n = 64 if row_bytes <= 128 else 32
        if max_rows > 16:
            return DecodeTiling(block_n, 4, 3, 2)
        if is_few:
            return DecodeTiling(2 * block_n if has_token_scales else block_n, 4, 3, 2, min_share=1)
        return DecodeTiling(block_n, 2, 3, 4)
    block_n = max(16, min(128, 16384 // row_bytes))
    if max_rows > 16 and are_tiles_few:
        return DecodeTiling(2 * block_n, 4, 3, 1, min_share=1, max_tile_rows=16)
    if max_rows > 32:
        return DecodeTiling(block_n, 4, 3, 2)
    if is_few:
        return DecodeTiling(2 * block_n, 4, 3, 1, min_share=1)
    return DecodeTiling(block_n, 2, 2, 4)
