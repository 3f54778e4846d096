"""Slot ``kv_pool``: the tensors that hold keys and values, and their precision."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

import kernels
from workbench.slots.component import Component


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of a model's KV, one entry a layer.

    ``num_kv_heads[i]`` heads of ``head_dim[i]``; dtype is the model's.
    """

    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        """Layers that keep KV."""
        return len(self.num_kv_heads)

    def followed_by(self, other: KVShape | None) -> KVShape:
        """These layers and those of ``other`` behind them, which is kept in this dtype too."""
        if other is None:
            return self
        return KVShape(
            self.num_kv_heads + other.num_kv_heads, self.head_dim + other.head_dim, self.dtype
        )


@dataclass(frozen=True, slots=True)
class RopeInputs:
    """What rotates queries and keys before they are written.

    Attributes
    ----------
    cos_sin : Tensor[max_position, rotary_dim] float32
        Cosines then sines, half and half.
    q_norm, k_norm : Tensor[D] or None
        Per-head RMSNorm weights applied before the rotation.
    norm_offset : float
        Added to the norm weights (1.0 for Gemma).
    """

    cos_sin: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6
    norm_offset: float = 0.0


class KVPool(Component):
    """Holds ``num_blocks`` blocks and one more, the trash block, that padding may write to."""

    shape: KVShape
    num_blocks: int
    block_size: int

    @classmethod
    @abstractmethod
    def bytes_per_token(cls, shape: KVShape) -> int:
        """Bytes that one token takes over all layers, before the pool exists."""

    @abstractmethod
    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each ``[num_blocks + 1, block_size, Hkv, D]``."""

    @abstractmethod
    def rotate_and_write(
        self,
        index: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_heads: int,
        rope: RopeInputs,
    ) -> torch.Tensor:
        """Rotate q and k of ``qkv[T, (Hq + 2 Hkv) * D]``, write k and v to their slots.

        May overwrite ``qkv``. Returns the rotated q, ``[T, Hq, D]``.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes the pool holds, trash block included."""

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy keys and values of the slots ``source[n]`` to the slots ``target[n]``, as if all at
        once: a slot may be in both."""
        for index in range(self.shape.num_layers):
            for cache in self.layer(index):
                slots = cache.view(-1, *cache.shape[2:])
                slots[target] = slots[source]

    def block_tensors(self) -> list[torch.Tensor]:
        """All tensors of the pool, as few as may be, each with the block as its first dimension.

        Together they are the whole of a block (keys, values, and scales where there are any), so
        whoever copies index ``i`` of each to index ``j`` has copied block ``i`` to block ``j``.
        """
        return [cache for i in range(self.shape.num_layers) for cache in self.layer(i)]


class ModelDtypePool(KVPool):
    """Keys and values as the model computes them: the null object."""

    def __init__(
        self,
        config: object = None,
        *,
        shape: KVShape,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(config)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        sizes = list(zip(shape.num_kv_heads, shape.head_dim, strict=True))
        # Zeroed, not merely reserved: memory is taken now, where the ledger says, and padding
        # that reads the trash block finds finite numbers. Layers of one size lie in one tensor, so
        # that a block of all of them is copied by one call.
        self._tensors = {
            (heads, dim): torch.zeros(
                sizes.count((heads, dim)),
                2,
                num_blocks + 1,
                block_size,
                heads,
                dim,
                dtype=shape.dtype,
                device=device,
            )
            for heads, dim in dict.fromkeys(sizes)
        }
        self._kv = []
        for index, size in enumerate(sizes):
            keys, values = self._tensors[size][sizes[:index].count(size)]
            self._kv.append((keys, values))

    @classmethod
    def bytes_per_token(cls, shape: KVShape) -> int:
        values = sum(h * d for h, d in zip(shape.num_kv_heads, shape.head_dim, strict=True))
        return 2 * values * shape.dtype.itemsize

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kv[index]

    def rotate_and_write(
        self,
        index: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_heads: int,
        rope: RopeInputs,
    ) -> torch.Tensor:
        k_cache, v_cache = self._kv[index]
        head_dim = k_cache.shape[-1]
        kernels.apply_rope_and_write_kv(
            qkv,
            positions,
            rope.cos_sin,
            slot_mapping,
            k_cache,
            v_cache,
            num_heads=num_heads,
            num_kv_heads=k_cache.shape[2],
            head_dim=head_dim,
            q_norm=rope.q_norm,
            k_norm=rope.k_norm,
            norm_eps=rope.eps,
            norm_offset=rope.norm_offset,
        )
        return qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)

    @property
    def num_bytes(self) -> int:
        return sum(kv.numel() * kv.element_size() for kv in self._tensors.values())

    def block_tensors(self) -> list[torch.Tensor]:
        return [kv.movedim(2, 0) for kv in self._tensors.values()]
