"""Slot ``drafter``: guesses of what comes next, for the verifier to check."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from workbench.core.step import ForwardBatch, SchedulerOutput
from workbench.slots.attention import AttentionBackend, AttentionLayer
from workbench.slots.component import Component
from workbench.slots.graph_runner import GraphRunner, PreparedStep
from workbench.slots.kv_pool import KVPool, KVShape


@dataclass(frozen=True, slots=True)
class DrafterHost:
    """What a drafter with weights of its own loads them by.

    Attributes
    ----------
    target : workbench.models.decoder.Decoder
        The model whose tokens are drafted.
    target_folder
        Its folder, if it has one.
    weights, seed
        ``checkpoint`` or ``random``, and of which seed, as for the target.
    max_model_len
        Tokens a request.
    models_dir
        Folder of the model store; None: the default one.
    load_decoder
        Loads a decoder as the target was loaded, from a model folder or the content of a
        ``config.json``, with components of its own.
    """

    target: Any
    target_folder: Path | None
    device: torch.device
    dtype: torch.dtype
    weights: str
    seed: int
    max_model_len: int
    models_dir: str | None
    load_decoder: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class DrafterBinding:
    """What a drafter runs on; given once more after a trial.

    Attributes
    ----------
    table : workbench.engine.request_table.RequestTable
        Rows of the running requests.
    pool
        Layers of KV of the drafter's own (:meth:`Drafter.kv_shape`), in the blocks that requests
        have for the target's.
    target_pool
        The target's layers, in the same blocks.
    make_attention
        Makes an attention backend of the engine's kind for layers over a pool, or says why it
        cannot serve them.
    step_tokens
        Most tokens of one step.
    reads_probs
        Whether the verifier tests drafts by what they were drawn from.
    vocab_size
        Of the target.
    graph_runner
        May run what the drafter prepares.
    step_parts : workbench.engine.prepared_step.StepParts
        What the target's prepared steps drive.
    """

    table: Any
    pool: KVPool
    target_pool: KVPool
    make_attention: Callable[[list[AttentionLayer], KVPool], AttentionBackend]
    vocab_size: int
    graph_runner: GraphRunner
    step_parts: Any
    step_tokens: int
    reads_probs: bool


@dataclass(frozen=True, slots=True)
class FollowedStep:
    """A step of the target, for drafters that run over all of its tokens.

    Attributes
    ----------
    request_ids, rows
        Of the batch, with their rows in the request table, which holds the tokens that came out.
    batch
        As the target ran it: ``T`` tokens.
    kept : dict[int, Tensor[T, H]]
        Hidden states by layer, those of :attr:`Drafter.kept_layers`.
    is_followed
        Whether :meth:`Drafter.follow_prepared` was part of the step, and its tokens are those that
        came out.
    """

    request_ids: list[str]
    rows: list[int]
    batch: ForwardBatch
    kept: dict[int, torch.Tensor]
    is_followed: bool = False


class PreparedTokens(Protocol):
    """What a prepared step that verifies leaves on the device once it has run.

    Attributes
    ----------
    places : Tensor[B, 2] int64
        By place, row of the request table and number of drafts.
    new_ids : Tensor[B, Q] int64
        New tokens, then -1.
    """

    places: torch.Tensor
    new_ids: torch.Tensor


@dataclass(slots=True)
class DraftContext:
    """What a drafter may look at after a step, for ``B`` requests that yielded a token.

    Attributes
    ----------
    token_ids : list[ndarray[int32]]
        Known tokens of each request, prompt and output, as views that must not be written.
    max_draft_tokens : list[int]
        Drafts that are worth proposing (the request's own limit less one); of a tree, nodes.
    num_prompt_tokens : list[int]
        How many of the known tokens are prompt.
    rows : list[int]
        Each request's row in the request table.
    drawn : list[list[int]] or None
        What the target drew behind the token before the drafts, then behind each draft of the last
        step, as many as were verified, for drafters that read it.
    """

    request_ids: list[str]
    token_ids: list[np.ndarray]
    max_draft_tokens: list[int]
    num_prompt_tokens: list[int]
    rows: list[int] = field(default_factory=list)
    drawn: list[list[int]] | None = None

    def take(self, indices: list[int]) -> DraftContext:
        """The same of some of the requests."""
        return DraftContext(
            request_ids=[self.request_ids[i] for i in indices],
            token_ids=[self.token_ids[i] for i in indices],
            max_draft_tokens=[self.max_draft_tokens[i] for i in indices],
            num_prompt_tokens=[self.num_prompt_tokens[i] for i in indices],
            rows=[self.rows[i] for i in indices] if self.rows else [],
            drawn=None if self.drawn is None else [self.drawn[i] for i in indices],
        )


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Proposals by request.

    Attributes
    ----------
    probs : Tensor[B, K, V] or list of (Tensor[K, V] or None), or None
        What the drafts were drawn from, float32, by request and position, where they were not
        proposed with certainty. The numbers that they were drawn with must be others than those of
        the request's seed (``uniform_from_seed``), with which they are tested.
    parents : list of (list[int] or None), or None
        Where a request's drafts are a tree, the draft that each one follows: an earlier one, or -1
        for the last known token. No two drafts that follow the same one are equal, and their
        ``probs`` are what each was drawn from given those before it.
    on_device : list of bool, or None
        Whose drafts are in the request table on the device already, behind the known tokens, or
        will be before the next step runs. The host knows how many there are and not which: its
        ``token_ids`` only count.
    """

    token_ids: list[list[int]]
    probs: torch.Tensor | Sequence[torch.Tensor | None] | None = None
    parents: Sequence[list[int] | None] | None = None
    on_device: Sequence[bool] | None = None


class Drafter(Component):
    """Proposes tokens. Reads the context, keeps what it needs by request id, forgets on finish.

    Where it raises or proposes what is not valid, that request goes on without drafts.
    """

    #: Whether it may propose anything.
    proposes: bool = True
    #: Whether drafts of a request may be a tree.
    proposes_trees: bool = False
    #: Whether it reads ``DraftContext.drawn``.
    reads_drawn: bool = False
    #: Most tokens it proposes for one request; sizes buffers and KV look-ahead.
    num_lookahead_tokens: int = 0
    #: Slots behind a request's last known token that it writes KV to before the target does.
    num_kv_lookahead: int = 0

    # -- drafters with a model of their own ------------------------------------------------------

    def load(self, host: DrafterHost) -> None:
        """Load weights; called once, after the target's.

        Raises
        ------
        WorkbenchError
            They cannot be had, or do not fit the target; says what would.
        """

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and tables of its own on the device."""
        return 0

    def kv_shape(self) -> KVShape | None:
        """Layers of KV that it keeps beside the target's; None where it keeps none."""
        return None

    def bind(self, binding: DrafterBinding) -> None:
        """Learn what it runs on, before the first step."""

    def prepared_steps(self) -> list[PreparedStep]:
        """Steps of kind :data:`~workbench.slots.graph_runner.DRAFT` for the graph runner to
        prepare, once it is bound; at most one."""
        return []

    @property
    def kept_layers(self) -> frozenset[int]:
        """Hidden states of the target that it follows, as of
        :class:`~workbench.slots.attention.KeptHidden`; none where it follows no step."""
        return frozenset()

    def follow(self, step: FollowedStep) -> None:
        """See every step of the target once its tokens are known, before :meth:`propose`."""

    def follow_prepared(self, batch: ForwardBatch, kept: Mapping[int, torch.Tensor]) -> None:
        """Queue, as part of a prepared step that has written its tokens to the table, what
        :meth:`follow` does on the device: with buffers that stay where they are, and without
        waiting for the device.

        Parameters
        ----------
        batch
            Of as many tokens of each request as of any other.
        kept
            As of :class:`FollowedStep`.
        """

    def draft_ahead(self, rows: list[int], step: PreparedTokens) -> None:
        """Begin to draft behind a prepared step that is queued, of these rows of the table, all of
        them greedy; the host does not know its tokens yet, the table on the device does. Does not
        wait for the device. :meth:`follow` and :meth:`propose` come once the tokens are known.
        """

    def note_plan(self, plan: SchedulerOutput) -> None:
        """See a step's plan before it runs: requests that start, and blocks that are given out."""

    # -- drafting ----------------------------------------------------------------------------------

    @abstractmethod
    def propose(self, context: DraftContext) -> DraftTokens:
        """One list a request, in order, of ids of the vocabulary, each no longer than
        ``max_draft_tokens`` and ``num_lookahead_tokens``."""

    @abstractmethod
    def finish(self, request_id: str) -> None:
        """Forget a request."""


class NoDrafter(Drafter):
    """Proposes nothing: the null object."""

    proposes = False

    def propose(self, context: DraftContext) -> DraftTokens:
        return DraftTokens([[] for _ in context.request_ids])

    def finish(self, request_id: str) -> None: ...
