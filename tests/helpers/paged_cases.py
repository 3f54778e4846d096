"""Small batches over a paged cache for the tests of attention kernels, and their fp64 truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.attention_reference import paged_attend_reference_with_lse
from kernels.quantized_kv import (
    allocate_kv_scales,
    dequantize_kv,
    find_head_scales,
    is_quantized,
    quantize_kv,
)
from tests.helpers.interpreted import DEVICE

#: Entries of a block table that must not be followed.
NOWHERE = 10**6
#: Error of an output over the greatest value of the cache. In half precision the weights of the
#: values are rounded before the product; the interpreter cuts bf16 off instead of rounding it.
BOUNDS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class PagedCase:
    """Requests over scattered blocks; whatever belongs to nobody is NaN, or has a scale of NaN.

    ``contexts`` are tokens before the queries, ``first_keys`` the first keys that exist: blocks
    wholly before them have no entry. ``is_strided`` gives the two caches different strides.
    """

    query_lens: list[int]
    contexts: list[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    scales_of: str = "tokens"
    size: float = 1.0
    first_keys: Sequence[int] | None = None
    is_strided: bool = False
    shared: int = 0
    seed: int = 0
    q: Tensor = field(init=False)
    k_scale: Tensor | None = field(init=False, default=None)
    v_scale: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.seq_lens = [q + c for q, c in zip(self.query_lens, self.contexts, strict=True)]
        self.block_table, written = self._lay_out()
        shape = (len(written), self.block_size, self.kv_heads, self.dim)
        self.k_cache, self.k_scale = self._fill(shape, written, 0)
        self.v_cache, self.v_scale = self._fill(shape, written, 1)
        width = (self.heads + 2 * self.kv_heads) * self.dim
        qkv = self._draw(sum(self.query_lens), width).to(self.dtype).to(DEVICE)
        self.q = qkv[:, : self.heads * self.dim].view(-1, self.heads, self.dim)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _lay_out(self) -> tuple[Tensor, Tensor]:
        """The block table, and which slots ``[num_blocks, block_size]`` hold a token."""
        size, rng = self.block_size, random.Random(self.seed)
        pages = [-(-n // size) for n in self.seq_lens]
        blocks = list(range(sum(pages) + 2))
        rng.shuffle(blocks)
        written = torch.zeros(len(blocks), size, dtype=torch.bool)
        table = torch.full((len(pages), max(pages, default=0) + 1), NOWHERE, dtype=torch.int32)
        common = [blocks.pop() for _ in range(self.shared // size)]
        for row, length in enumerate(self.seq_lens):
            first = self.first_keys[row] if self.first_keys is not None else 0
            for page in range(first // size, pages[row]):
                is_common = page < len(common)
                table[row, page] = block = common[page] if is_common else blocks.pop()
                written[block, : min(size, length - page * size)] = True
        return table.to(DEVICE), written

    def _fill(
        self, shape: tuple[int, ...], written: Tensor, which: int
    ) -> tuple[Tensor, Tensor | None]:
        cache = self.size * self._draw(*shape)
        is_free = ~written.view(*shape[:2], 1, 1)
        if self.cache_dtype is None:
            cache = cache.masked_fill(is_free, float("nan")).to(self.dtype)
            if self.is_strided and which == 0:
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            elif self.is_strided:
                cache = torch.stack([cache, cache], dim=1)[:, 0]
            return cache.to(DEVICE), None
        fixed = find_head_scales(cache, self.cache_dtype) if self.scales_of == "heads" else None
        stored, scale = quantize_kv(cache, self.cache_dtype, fixed)
        if fixed is None:
            laid_out = allocate_kv_scales(*shape[:3])  # type: ignore[arg-type]
            scale = laid_out.copy_(scale.masked_fill(is_free.squeeze(-1), float("nan")))
        return stored.to(DEVICE), scale.to(DEVICE)

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).int()
        return starts.to(DEVICE), torch.tensor(self.seq_lens).int().to(DEVICE)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of ``paged_attend`` and of the kernels."""
        caches = (self.q, self.k_cache, self.v_cache, self.block_table)
        return (*caches, *self.lengths, self.scale)

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def truth(self, key_start: Sequence[int] | None = None, **masks: Any) -> tuple[Tensor, Tensor]:
        """fp64 output and log-sum-exps from what the caches really hold."""
        k_cache, v_cache = (
            cache.double() if scale is None else dequantize_kv(cache, scale, torch.float64)
            for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale))
        )
        return paged_attend_reference_with_lse(
            self.q.double(),
            k_cache,
            v_cache,
            self.block_table,
            self.query_lens,
            self.seq_lens,
            self.scale,
            key_start=key_start,
            **masks,
        )

    def check(self, out: Tensor, truth: Tensor) -> None:
        """Every element is there and near the truth, in units of the cache's greatest value."""
        assert out.shape == truth.shape and out.dtype == self.dtype and out.is_contiguous()
        bound = BOUNDS[self.dtype] * 4 * self.size
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=bound)

    def check_lse(self, lse: Tensor, truth: Tensor) -> None:
        assert lse.shape == truth.shape and lse.dtype == torch.float32
        bound = 2e-5 if self.dtype == torch.float32 and not is_quantized(self.k_cache) else 2e-2
        torch.testing.assert_close(lse.double(), truth, rtol=0, atol=bound)
