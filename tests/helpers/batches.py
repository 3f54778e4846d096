"""Drives a decoder without an engine: batches built by hand over a pool and block tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workbench.core.step import ForwardBatch
from workbench.models.decoder import Decoder
from workbench.slots.attention import AttentionBackend, ForwardContext, SdpaAttention
from workbench.slots.kv_pool import KVPool, ModelDtypePool


@dataclass
class DrivenSequence:
    """Tokens of one request, how many have KV, and its blocks."""

    token_ids: list[int]
    blocks: list[int]
    num_computed: int = 0


@dataclass
class BatchDriver:
    """Runs chosen numbers of tokens of chosen sequences in one forward pass.

    Parameters
    ----------
    block_size
        Tokens a block; one huge block a sequence is the contiguous layout.
    max_tokens
        Tokens a sequence may reach.
    """

    decoder: Decoder
    block_size: int = 4
    max_tokens: int = 64
    max_sequences: int = 4
    attention: AttentionBackend = field(default_factory=SdpaAttention)

    def __post_init__(self) -> None:
        self.blocks_each = -(-self.max_tokens // self.block_size)
        num_blocks = self.blocks_each * self.max_sequences
        self.pool: KVPool = ModelDtypePool(
            shape=self.decoder.spec.kv_shape(self.decoder.dtype),
            num_blocks=num_blocks,
            block_size=self.block_size,
            device=self.decoder.device,
        )
        # Shuffled, so that a sequence's blocks do not happen to lie side by side in order.
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self._free = order.tolist()

    def add(self, token_ids: Sequence[int]) -> DrivenSequence:
        """Register a sequence and give it its blocks."""
        blocks = [self._free.pop() for _ in range(self.blocks_each)]
        return DrivenSequence(list(token_ids), blocks)

    def batch(self, plan: Sequence[tuple[DrivenSequence, int]]) -> ForwardBatch:
        """Batch of the next ``n`` tokens of each sequence; logits at every token."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, count in plan:
            span = range(sequence.num_computed, sequence.num_computed + count)
            ids += [sequence.token_ids[i] for i in span]
            positions += span
            slots += [
                sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size
                for i in span
            ]
            starts.append(len(ids))
        device = self.decoder.device
        seq_lens = [sequence.num_computed + count for sequence, count in plan]

        def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return ForwardBatch(
            input_ids=tensor(ids, torch.int64),
            positions=tensor(positions, torch.int64),
            query_start_loc=tensor(starts, torch.int32),
            seq_lens=tensor(seq_lens, torch.int32),
            block_table=tensor([sequence.blocks for sequence, _ in plan], torch.int32),
            slot_mapping=tensor(slots, torch.int64),
            logits_indices=torch.arange(len(ids), device=device),
            rows=torch.arange(len(plan), device=device),
            query_lens_host=[count for _, count in plan],
            seq_lens_host=seq_lens,
            block_size=self.block_size,
        )

    @torch.inference_mode()
    def step(self, plan: Sequence[tuple[DrivenSequence, int]]) -> list[torch.Tensor]:
        """Logits ``[n, V]`` of each sequence's next ``n`` tokens."""
        batch = self.batch(plan)
        context = ForwardContext(
            batch, self.attention, self.attention.build_metadata(batch), self.pool
        )
        hidden = self.decoder.forward(batch, context)
        logits = self.decoder.compute_logits(hidden[batch.logits_indices])
        for sequence, count in plan:
            sequence.num_computed += count
        return list(logits.split(batch.query_lens_host))

    def decode(self, sequences: Sequence[DrivenSequence]) -> None:
        """Run every token that has no KV yet, and append each sequence's greedy next token."""
        plan = [(s, len(s.token_ids) - s.num_computed) for s in sequences]
        for sequence, logits in zip(sequences, self.step(plan), strict=True):
            sequence.token_ids.append(int(logits[-1].argmax()))
