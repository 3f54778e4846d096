"""What steps have in common that are work of the device alone, for whoever captures or replays
them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from workbench.core.step import ForwardBatch
from workbench.engine.request_table import RequestTable
from workbench.engine.upload import borrowed
from workbench.slots.attention import (
    PLAIN_FORM,
    AttentionBackend,
    ForwardContext,
    KeptHidden,
    StepForm,
)
from workbench.slots.component import Component
from workbench.slots.kv_pool import KVPool
from workbench.slots.sampler import Sampler, SamplingMetadata

if TYPE_CHECKING:
    from workbench.engine.model_runner import Model


#: What is read of a step's last run from outside, by size and form.
Kept = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepParts:
    """What prepared steps drive.

    Attributes
    ----------
    components
        By slot, those whose counts a step adds to.
    owned
        What was kept of runs and whose memory is not yet anybody else's, of all steps that share
        these parts: where it is kept, under which key, and itself.
    kept_layers
        Whose hidden states are kept, as of :class:`~workbench.slots.attention.KeptHidden`.
    follow
        Queued with them behind a step that has written its tokens
        (:meth:`~workbench.slots.drafter.Drafter.follow_prepared`).
    """

    model: Model
    table: RequestTable
    pool: KVPool
    attention: AttentionBackend
    sampler: Sampler
    components: Mapping[str, Component]
    owned: list[tuple[Kept, tuple[int, str], torch.Tensor]] = field(default_factory=list)
    kept_layers: frozenset[int] = frozenset()
    follow: Callable[[ForwardBatch, Mapping[int, torch.Tensor]], None] | None = None


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A prepared step in one size and form, and tokens of it that pad."""

    step: UniformStep
    size: int
    num_padded_tokens: int
    form: str = PLAIN_FORM

    def logits(self) -> torch.Tensor:
        """Behind all of its tokens, once it is queued."""
        return self.step.logits[self.size, self.form]

    def states(self, num_tokens: int) -> dict[int, torch.Tensor]:
        """Kept hidden states of its first tokens, by layer."""
        return self.step.kept_states(self.size, self.form, num_tokens)


class PreparedStep(ABC):
    """A step over buffers that stay where they are, padded to one of a few sizes.

    Places that no request holds run the table's padding row, whose keys and values go to the pool's
    trash block.

    Attributes
    ----------
    kind
        Which kind of step it is, for the graph runner.
    max_size
        Largest size: ``tokens_each`` tokens for each unit of it.
    forms : tuple[StepForm, ...]
        Those of the attention backend, beside the plain one.
    """

    kind: ClassVar[str]

    def __init__(
        self, parts: StepParts, max_size: int, tokens_each: int, num_requests: int
    ) -> None:
        self.parts = parts
        self.max_size, self.tokens_each = max_size, tokens_each
        table, pool = parts.table, parts.pool
        table.block_table[table.padding_row] = pool.num_blocks
        table.host_block_table[table.padding_row] = pool.num_blocks
        long: dict[str, Any] = {"dtype": torch.int64, "device": table.device}
        short: dict[str, Any] = {"dtype": torch.int32, "device": table.device}
        tokens, columns = max_size * tokens_each, table.block_table.shape[1]
        self._whole = ForwardBatch(
            input_ids=torch.zeros(tokens, **long),
            positions=torch.zeros(tokens, **long),
            query_start_loc=torch.zeros(num_requests + 1, **short),
            seq_lens=torch.zeros(num_requests, **short),
            block_table=torch.full((num_requests, columns), pool.num_blocks, **short),
            slot_mapping=torch.zeros(tokens, **long),
            logits_indices=torch.arange(tokens, **long),
            rows=self.place_rows(),
            query_lens_host=[tokens_each] * num_requests,
            seq_lens_host=[tokens_each] * num_requests,
            block_size=pool.block_size,
        )
        self.forms: tuple[StepForm, ...] = ()
        self._states: dict[int, Kept] = {layer: {} for layer in parts.kept_layers}

    def kept_states(self, size: int, form: str, num_tokens: int) -> dict[int, torch.Tensor]:
        """Hidden states that were kept of the last step of this size and form, by layer, of its
        first tokens."""
        return {layer: kept[size, form][:num_tokens] for layer, kept in self._states.items()}

    @abstractmethod
    def place_rows(self) -> torch.Tensor:
        """Row of the request table of each place, ``[B]`` int64, on the device."""

    @abstractmethod
    def batch(self, size: int) -> ForwardBatch:
        """The step in this size as a batch: views of the buffers. Its host lengths are not kept
        up."""

    @abstractmethod
    def gather(self, batch: ForwardBatch) -> None:
        """Fill the batch from the table."""

    @abstractmethod
    def finish(self, batch: ForwardBatch, hidden: torch.Tensor, key: tuple[int, str]) -> None:
        """Queue what follows the model's hidden states ``[T, H]``, and :meth:`keep` what is read
        from outside, under this size and form."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its own buffers on the device; what it keeps lies in the memory of whoever runs
        it."""
        whole = self._whole
        held = (
            whole.input_ids,
            whole.positions,
            whole.query_start_loc,
            whole.seq_lens,
            whole.block_table,
            whole.slot_mapping,
            whole.logits_indices,
        )
        return sum(tensor.nbytes for tensor in held)

    def counters(self) -> dict[str, float]:
        """Counts of the components that it drives, as ``slot.counter``."""
        return {
            f"{slot}.{name}": value
            for slot, component in self.parts.components.items()
            for name, value in component.counters().items()
        }

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        """Queue the step in this size and form."""
        self._lend()
        parts, batch = self.parts, self.batch(size)
        self.gather(batch)
        metadata = parts.attention.prepared_metadata(batch, form)
        kept = KeptHidden(parts.kept_layers) if parts.kept_layers else None
        context = ForwardContext(batch, parts.attention, metadata, parts.pool, kept)
        hidden = parts.model.forward(batch, context)
        if kept is not None:
            for layer, state in kept.states.items():
                self.keep(self._states[layer], (size, form), state)
        self.finish(batch, hidden, (size, form))

    def keep(self, kept: Kept, key: tuple[int, str], tensor: torch.Tensor) -> None:
        """Keep what a run gave, until the next one of any step may overwrite it."""
        kept[key] = tensor
        self.parts.owned.append((kept, key, tensor))

    def _lend(self) -> None:
        """Let what earlier runs gave be overwritten: captured steps of all kinds and sizes share
        memory."""
        if self._whole.input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        for kept, key, tensor in self.parts.owned:
            kept[key] = borrowed(tensor)
        self.parts.owned.clear()


class UniformStep(PreparedStep):
    """Runs ``Q`` tokens of each of the first ``size`` places, and draws behind each.

    Attributes
    ----------
    tokens_each
        ``Q``.
    new_ids : Tensor[B, Q] int64
        New tokens of the last step, then -1.
    logits : dict[tuple[int, str], Tensor[size * Q, V]]
        Of the last step of each size and form.
    writes_tokens
        Whether it draws greedily and writes back what it drew; who wants other tokens overwrites
        them, from :attr:`logits`, before the next step.
    """

    writes_tokens: bool = True

    def __init__(self, parts: StepParts, max_size: int, tokens_each: int) -> None:
        super().__init__(parts, max_size, tokens_each, num_requests=max_size)
        whole, device = self._whole, parts.table.device
        self.new_ids = torch.zeros(max_size, tokens_each, dtype=torch.int64, device=device)
        self.logits: Kept = {}
        whole.query_start_loc.copy_(torch.arange(max_size + 1, device=device) * tokens_each)
        whole.seq_lens.fill_(tokens_each)

    @abstractmethod
    def store(self, batch: ForwardBatch, drawn: torch.Tensor) -> None:
        """Write what was drawn behind each token, ``[size * Q]``, back to the table and to
        :attr:`new_ids`."""

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.new_ids.nbytes

    def batch(self, size: int) -> ForwardBatch:
        whole, tokens = self._whole, size * self.tokens_each
        return dataclasses.replace(
            whole,
            input_ids=whole.input_ids[:tokens],
            positions=whole.positions[:tokens],
            query_start_loc=whole.query_start_loc[: size + 1],
            seq_lens=whole.seq_lens[:size],
            block_table=whole.block_table[:size],
            slot_mapping=whole.slot_mapping[:tokens],
            logits_indices=whole.logits_indices[:tokens],
            rows=whole.rows[:size],
            query_lens_host=whole.query_lens_host[:size],
            seq_lens_host=whole.seq_lens_host[:size],
            extras={},
        )

    def finish(self, batch: ForwardBatch, hidden: torch.Tensor, key: tuple[int, str]) -> None:
        parts = self.parts
        logits = parts.model.compute_logits(hidden)
        if self.writes_tokens:
            nothing = batch.positions[:0]
            greedy = SamplingMetadata(params=[], positions=nothing, seeds=nothing)
            self.store(batch, parts.sampler.sample(logits, greedy).token_ids)
            if parts.follow is not None and self._states:
                parts.follow(batch, self.kept_states(*key, batch.num_tokens))
        self.keep(self.logits, key, logits)
