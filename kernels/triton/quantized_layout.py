"""How codes of 4 and 8 bits lie in memory for the Triton kernels, and the pieces that read them.

A weight is cut into tiles of 16 rows and 128 columns (a chunk), padded where it is no multiple of
them, and a tile lies in one piece: 1 KiB of 4-bit codes, 2 KiB of 8-bit ones. Any program that
takes rows in sixteens so reads memory in order, whether it walks along K in steps of a chunk
(products by tensor cores) or takes all of it at once (products of single rows).

8 bits: a row of a tile is its codes, signed bytes in order of their columns.

4 bits: codes count from 0. A row of a tile is 32 words of 16 bits (64 bytes); word ``c`` holds the
columns ``c``, ``32 + c``, ``64 + c`` and ``96 + c``, from its lowest bits up. So

- word by word, the tile shifted by ``4 r`` is run ``r``: 32 columns that follow one another, which
  no group of 32, 64 or a multiple of 128 inputs cuts;
- two neighbours of one run, as tensor cores take them, lie 16 bits apart in 32: one mask has both;
- of 16 bytes, the widest load, a run has 8 columns in order: x is read by 16 bytes as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 16
CHUNK = 128  # columns
SERVED_GROUPS = "32, 64, a multiple of 128, or all inputs"
_RUNS = 4  # of 32 columns in a chunk
_ROWS_AT_ONCE = 8192  # of a weight, when it is packed: bounds the memory that this takes


def num_chunks(in_features: int) -> int:
    """Chunks of a row."""
    return -(-in_features // CHUNK)


def group_of(in_features: int, num_groups: int) -> int:
    """Inputs that share a scale; 0: all of an output.

    Raises
    ------
    ValueError
        No group that the kernels serve.
    """
    if num_groups == 1:
        return 0
    group = in_features // num_groups
    if group * num_groups != in_features or not is_served(group):
        raise ValueError(
            f"{num_groups} groups of {in_features} inputs: groups must be of {SERVED_GROUPS}"
        )
    return group


def is_served(group: int) -> bool:
    """Whether the kernels serve groups of so many inputs; 0 is one scale an output."""
    return group in (32, 64) or group % CHUNK == 0


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the packed codes, int32: tiles of rows, chunks, rows of a tile, words of 32 bits."""
    rows = -(-out_features // TILE_ROWS)
    return rows, num_chunks(in_features), TILE_ROWS, CHUNK * bits // 32


def pack_tiles(codes: Tensor, bits: int, padding: int = 0) -> Tensor:
    """Lay codes ``[N, K]`` out in tiles.

    Parameters
    ----------
    codes : Tensor [N, K] int
        4 bits: from 0 to 15; 8 bits: from -128 to 127.
    bits : int
    padding : int
        Code of columns and rows beyond the end. Their products are never used.

    Returns
    -------
    Tensor int32
        As :func:`packed_shape` says.
    """
    out_features, in_features = codes.shape
    shape = packed_shape(out_features, in_features, bits)
    out = torch.empty(shape, dtype=torch.int32, device=codes.device)
    for first in range(0, codes.shape[0], _ROWS_AT_ONCE):
        some = codes[first : first + _ROWS_AT_ONCE]
        beyond = (0, -some.shape[1] % CHUNK, 0, -some.shape[0] % TILE_ROWS)
        some = F.pad(some.to(torch.int8), beyond, value=padding)
        tiles = some.view(-1, TILE_ROWS, some.shape[1] // CHUNK, CHUNK).transpose(1, 2)
        target = out[first // TILE_ROWS :][: len(tiles)]
        if bits == 8:
            target.view(torch.int8).copy_(tiles)
            continue
        runs = tiles.reshape(*tiles.shape[:3], _RUNS, CHUNK // _RUNS).to(torch.int16)
        words = runs[..., 0, :].clone()
        for run in range(1, _RUNS):
            words |= runs[..., run, :] << (4 * run)
        target.view(torch.int16).copy_(words)
    return out


def unpack_tiles(packed: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """What :func:`pack_tiles` packed: codes ``[N, K]``, int8."""
    if bits == 8:
        tiles = packed.view(torch.int8)
    else:
        words = packed.view(torch.int16)
        tiles = torch.cat([((words >> 4 * run) & 15).to(torch.int8) for run in range(_RUNS)], 3)
    rows, chunks = packed.shape[:2]
    codes = tiles.transpose(1, 2).reshape(rows * TILE_ROWS, chunks * CHUNK)
    return codes[:out_features, :in_features]
