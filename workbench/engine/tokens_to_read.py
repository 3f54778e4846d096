"""Tokens from the device to the host, without waiting for what is queued behind them."""

from __future__ import annotations

from typing import Any

import torch


class TokensToRead:
    """Token ids, of any shape, on their way to the host."""

    def __init__(self, token_ids: torch.Tensor) -> None:
        self._host = token_ids
        self._event: torch.cuda.Event | None = None
        if token_ids.is_cuda:
            self._host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._host.copy_(token_ids, non_blocking=True)
            self._event = torch.cuda.current_stream(token_ids.device).record_event()

    def read(self) -> list[Any]:
        """Wait for them, and for nothing queued after them."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[Any] = self._host.tolist()
        return tokens
