"""Paged attention that reads a prefix once for all requests of a batch that share its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from kernels import triton
from kernels.attention import MAX_DECODE_QUERIES
from kernels.shared_prefix import cascade_attend
from techniques.attention import (
    capability_reasons,
    dtype_reasons,
    head_dim_reasons,
    quantized_reasons,
)
from techniques.cascade_attention.groups import PrefixGroup, find_groups
from techniques.cascade_attention.plan import GroupTensors, PlanBuffers, group_tensors
from workbench.core.errors import ConfigError
from workbench.core.step import ForwardBatch
from workbench.slots.attention import (
    PLAIN_FORM,
    AttentionBackend,
    AttentionLayer,
    CudaGraphSupport,
    StepForm,
    tree_of,
)
from workbench.slots.kv_pool import KVPool

_FORM = "cascade"


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """Options of :class:`CascadeAttention`.

    Attributes
    ----------
    min_requests
        Requests that must share a prefix.
    min_shared_tokens
        Tokens that it must have.
    max_groups
        Groups of a prepared step; of more, those are kept that save the most.
    step_granularity
        Prepared steps with groups have sizes that are multiples of it.
    """

    min_requests: int = 4
    min_shared_tokens: int = 256
    max_groups: int = 16
    step_granularity: int = 32


@dataclass(frozen=True, slots=True)
class CascadeMetadata:
    """A batch, and its groups where there are any.

    Attributes
    ----------
    is_prepared
        It is of a prepared step: the batch's host lengths are those of no step, and the groups
        are known on the device alone.
    """

    batch: ForwardBatch
    groups: list[PrefixGroup]
    tensors: GroupTensors | None
    max_query_len: int
    is_prepared: bool = False


class CascadeAttention(AttentionBackend):
    """Attention of a group's queries to their shared prefix in one pass without a mask, attention
    of each request to what follows it in another, joined exactly by their log-sum-exps.

    Groups are found by the block tables alone: whatever shares blocks shares a prefix. Layers with
    a sliding window, and batches without a group, take the plain kernel. So do requests with a
    piece of a prompt: its queries are many for the keys that they meet as it is.

    A prepared step has a form with groups beside the plain one. It reads them from tensors on the
    device, which are written anew where the requests that decode change.
    """

    Config = CascadeConfig
    config: CascadeConfig
    #: Launches depend on shapes alone.
    cudagraph_support = CudaGraphSupport.UNIFORM_SINGLE_TOKEN
    supports_trees = True

    def __init__(self, config: CascadeConfig | None = None) -> None:
        super().__init__(config)
        if self.config.min_requests < 2 or self.config.min_shared_tokens < 1:
            raise ConfigError(
                f"attention.min_requests={self.config.min_requests} must be 2 or more, and "
                f"min_shared_tokens={self.config.min_shared_tokens} 1 or more."
            )
        if self.config.max_groups < 1 or self.config.step_granularity < 1:
            raise ConfigError(
                f"attention.max_groups={self.config.max_groups} and "
                f"step_granularity={self.config.step_granularity} must be 1 or more."
            )
        self._buffers: PlanBuffers | None = None
        self._planned: list[PrefixGroup] = []  # in the buffers
        self._block_size = 0
        self._last: CascadeMetadata | None = None
        self.reset_counters()

    def build_metadata(self, batch: ForwardBatch) -> CascadeMetadata:
        # While the same requests decode, their batch is one object and only their ends grow.
        if self._last is None or self._last.batch is not batch:
            groups = self._find(batch)
            tensors = group_tensors(batch, groups) if groups else None
            self._last = CascadeMetadata(batch, groups, tensors, batch.max_query_len)
        self._count(self._last.groups, batch.block_size)
        return self._last

    # -- prepared steps -----------------------------------------------------------------------

    def step_forms(self, batch: ForwardBatch) -> tuple[StepForm, ...]:
        num_requests, num_columns = batch.block_table.shape
        if num_requests < self.config.min_requests:
            return ()
        self._block_size = batch.block_size
        max_groups = min(self.config.max_groups, num_requests // self.config.min_requests)
        self._buffers = PlanBuffers(num_requests, num_columns, max_groups, batch.block_table.device)
        return (StepForm(_FORM, self.config.step_granularity),)

    def prepared_metadata(self, batch: ForwardBatch, form: str) -> CascadeMetadata:
        tensors = None
        if form == _FORM:
            assert self._buffers is not None
            tensors = self._buffers.tensors(batch.num_requests)
        return CascadeMetadata(batch, [], tensors, 1, is_prepared=True)

    def choose_form(self, batch: ForwardBatch) -> str:
        groups = self._find(batch)
        if not groups:
            return PLAIN_FORM
        assert self._buffers is not None
        if len(groups) > self._buffers.max_groups:
            groups.sort(key=lambda group: -group.saved_blocks)
            groups = sorted(groups[: self._buffers.max_groups], key=lambda group: group.members)
        self._buffers.write(batch, groups)
        self._planned = groups
        return _FORM

    def note_prepared(self, form: str) -> None:
        if form == _FORM:
            self._count(self._planned, self._block_size)

    # -- groups -------------------------------------------------------------------------------

    def _find(self, batch: ForwardBatch) -> list[PrefixGroup]:
        if batch.num_requests < self.config.min_requests:
            return []
        # Of the tokens before its queries alone: these do not see all that comes after.
        num_complete = [
            (length - queries) // batch.block_size if queries <= MAX_DECODE_QUERIES else 0
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
        tree = tree_of(batch, layer.sliding_window)
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
                seq_lens_list=None if metadata.is_prepared else batch.seq_lens_host,
                max_query_len=metadata.max_query_len,
                tree=tree,
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
            tree=tree,
            is_padded=metadata.is_prepared,
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

    def _count(self, groups: list[PrefixGroup], block_size: int) -> None:
        counts = self._counts
        counts["steps_with_groups"] += bool(groups)
        for group in groups:
            counts["prefix_groups"] += 1
            counts["grouped_requests"] += len(group.members)
            counts["prefix_tokens_read"] += group.num_blocks * block_size
            counts["prefix_tokens_saved"] += group.saved_blocks * block_size

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
