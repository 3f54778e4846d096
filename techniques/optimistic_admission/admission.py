"""Promise the known tokens and a little more (Kwon et al. 2023, arXiv:2309.06180, section 4.5)."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError, unknown_name
from workbench.core.request import Request
from workbench.slots.admission import Admission

_PREEMPTION = ("recompute", "swap")


@dataclass(frozen=True, slots=True)
class OptimisticConfig:
    """Options of :class:`Optimistic`.

    Attributes
    ----------
    headroom_tokens
        Output tokens that a request is promised beyond what is known when it starts. More means
        fewer pre-emptions and fewer requests at once.
    preemption
        What becomes of a pre-empted request's KV: ``recompute`` gives it up (the prefix cache, if
        there is one, keeps what it can), ``swap`` copies it to the host tier.
    """

    headroom_tokens: int = 16
    preemption: str = "recompute"


class Optimistic(Admission):
    """Few requests come to all of ``max_tokens``: admit more of them, and pre-empt if they do."""

    Config = OptimisticConfig
    config: OptimisticConfig

    def __init__(self, config: OptimisticConfig) -> None:
        super().__init__(config)
        if config.headroom_tokens < 0:
            raise ConfigError(
                f"engine.admission.headroom_tokens={config.headroom_tokens} must be 0 or more."
            )
        if config.preemption not in _PREEMPTION:
            raise unknown_name("engine.admission.preemption", config.preemption, _PREEMPTION)
        self.preempts_to_host = config.preemption == "swap"

    def reserve_tokens(self, request: Request) -> int:
        return min(request.num_tokens + self.config.headroom_tokens, request.max_total_tokens)
