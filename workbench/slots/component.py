"""What every component of the engine shares: a frozen config beside its class, and counters."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class NoConfig:
    """A component without options."""


class Component(ABC):  # noqa: B024 - its subclasses, the slots, have the abstract methods
    """Base of everything that fills a slot.

    A component is built as ``Class(Config(...), <runtime objects by keyword>)`` and nowhere but in
    ``workbench.components``. ``Config`` is its whole configuration, resolved and never mutated.
    """

    Config: ClassVar[type[Any]] = NoConfig
    #: Whether it orders by ``Request.priority``; without one that does, giving a priority is an
    #: error.
    uses_priority: ClassVar[bool] = False

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def counters(self) -> dict[str, float]:
        """Counts since the last :meth:`reset_counters`, the evidence that the component ran."""
        return {}

    def reset_counters(self) -> None:  # noqa: B027 - most components count nothing
        """Set every counter to zero."""

    def clear_cached(self) -> None:  # noqa: B027 - most components keep nothing
        """Forget what was learnt from requests that are done, so that what comes starts cold."""
