"""The shortest work first (Smith 1956, doi:10.1002/nav.3800030106), by the length of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.slots.policy import Policy


@dataclass(frozen=True, slots=True)
class ShortestPromptFirstConfig:
    """Options of :class:`ShortestPromptFirst`.

    Attributes
    ----------
    bucket_tokens
        Prompts whose lengths fall into the same bucket of this width go in order of arrival.
    """

    bucket_tokens: int = 1


class ShortestPromptFirst(Policy):
    """Order the waiting queue by prompt length; equals keep their order of arrival."""

    Config = ShortestPromptFirstConfig
    config: ShortestPromptFirstConfig

    def __init__(self, config: ShortestPromptFirstConfig) -> None:
        super().__init__(config)
        if config.bucket_tokens < 1:
            raise ConfigError(
                f"engine.policy.bucket_tokens={config.bucket_tokens} must be 1 or more."
            )

    def key(self, request: Request, arrival_index: int) -> int:
        return request.num_prompt_tokens // self.config.bucket_tokens
