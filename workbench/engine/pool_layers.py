"""Part of a KV pool, for a model that shares the blocks of another."""

from __future__ import annotations

import torch

from workbench.slots.kv_pool import KVPool, KVShape, RopeInputs


class PoolLayers(KVPool):
    """Some of a pool's layers as a pool of their own, numbered from 0; it holds no memory itself.

    Parameters
    ----------
    first
        The pool's layer that is layer 0 here.
    num_layers
        How many of those that follow.
    """

    def __init__(self, pool: KVPool, first: int, num_layers: int) -> None:
        super().__init__()
        last = first + num_layers
        self._pool, self._first = pool, first
        self.shape = KVShape(
            pool.shape.num_kv_heads[first:last], pool.shape.head_dim[first:last], pool.shape.dtype
        )
        self.num_blocks, self.block_size = pool.num_blocks, pool.block_size

    @classmethod
    def bytes_per_token(cls, shape: KVShape) -> int:
        return 0

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.layer(self._first + index)

    def rotate_and_write(
        self,
        index: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_heads: int,
        rope: RopeInputs,
    ) -> torch.Tensor:
        return self._pool.rotate_and_write(
            self._first + index, qkv, positions, slot_mapping, num_heads, rope
        )

    @property
    def num_bytes(self) -> int:
        return 0
