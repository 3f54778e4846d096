"""Slot ``graph_runner``: how steps of a few regular kinds are launched."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from workbench.slots.attention import PLAIN_FORM, AttentionBackend, StepForm
from workbench.slots.component import Component
from workbench.slots.platform import Platform

#: Kinds of prepared steps: every request runs its last token; every request runs its last token
#: and its drafts, padded to as many as there may be; requests run any numbers of tokens; a model of
#: the drafter's own drafts for every request.
DECODE, VERIFY, MIXED, DRAFT = "decode", "verify", "mixed", "draft"


class PreparedStep(Protocol):
    """A step as work of the device alone, in which every request runs as many tokens, or any.

    Its inputs come from tables on the device by row, its buffers stay where they are, and its
    places beyond the running requests hold padding, which writes to the trash block.
    """

    @property
    def kind(self) -> str:
        """:data:`DECODE`, :data:`VERIFY`, :data:`MIXED` or :data:`DRAFT`."""
        ...

    @property
    def max_size(self) -> int:
        """Most requests of a step; of a mixed one, tokens."""
        ...

    @property
    def tokens_each(self) -> int:
        """Tokens that a request runs, padding included; 1 of a mixed step, whose size is that of
        its tokens."""
        ...

    @property
    def forms(self) -> tuple[StepForm, ...]:
        """Forms to prepare beside the plain one."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of its own buffers on the device."""
        ...

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        """Queue the step for the first ``size`` places: inputs, model, sampling, write-back; of a
        mixed step, inputs and model. Never waits for the device, and launches the same whatever
        the places hold."""
        ...

    def counters(self) -> dict[str, float]:
        """Counts of the components that it drives, as ``slot.counter``."""
        ...


class GraphRunner(Component):
    """Prepares steps ahead of the first request, padded to a few sizes."""

    #: Whether it prepares any; else it is given no step, and the buffers of one are not there.
    prepares: ClassVar[bool] = True

    def unsupported_reasons(self, platform: Platform, attention: AttentionBackend) -> list[str]:
        """Why it cannot prepare steps here; empty when it can."""
        return []

    def largest_verify(self, attention: AttentionBackend, tokens_each: int) -> int:
        """Most requests of a prepared step that verifies drafts, ``tokens_each`` tokens a request;
        0 where it prepares none."""
        return 0

    def largest_mixed(self, attention: AttentionBackend, step_tokens: int) -> int:
        """Most tokens, padding included, of a prepared step in which requests run any numbers of
        them, where no step has more than ``step_tokens``; 0 where it prepares none."""
        return 0

    @abstractmethod
    def capture(self, steps: Sequence[PreparedStep]) -> None:
        """Prepare steps, one of a kind, in all sizes and forms. Called once, before the first
        request."""

    @abstractmethod
    def dispatch(self, kind: str, count: int, form: str = PLAIN_FORM) -> int | None:
        """Size, padding included, under which so many requests run in this kind of step and form,
        or so many tokens in a mixed one; None where none is prepared, as before
        :meth:`capture`: another form may be, or the ops are launched one by one."""

    @abstractmethod
    def run(self, kind: str, size: int, form: str = PLAIN_FORM) -> None:
        """Queue the step of this kind that was prepared in this size and form."""

    def replayed_counters(self) -> dict[str, float]:
        """What components would have counted in steps that ran without them, as
        ``slot.counter``."""
        return {}

    def compile(self, steps: Sequence[PreparedStep]) -> None:
        """Compile what :meth:`trial_bytes` and :meth:`capture` are going to run, and nothing else
        where the caller asks for that (:func:`kernels.triton.compiled_together`)."""

    def trial_bytes(self, steps: Sequence[PreparedStep]) -> int:
        """Device memory that prepared steps are going to hold, found by preparing a few of them
        and dropping these again. Called before :meth:`capture`, with steps of its own."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Device memory that prepared steps hold."""
        return 0


class EagerRunner(GraphRunner):
    """Prepares nothing: the null object."""

    prepares = False

    def capture(self, steps: Sequence[PreparedStep]) -> None: ...

    def dispatch(self, kind: str, count: int, form: str = PLAIN_FORM) -> int | None:
        return None

    def run(self, kind: str, size: int, form: str = PLAIN_FORM) -> None:
        raise AssertionError("nothing is prepared")
