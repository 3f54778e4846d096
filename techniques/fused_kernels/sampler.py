"""Greedy choice, truncation and the draw in one launch, in Triton (``kernels.triton``)."""

from __future__ import annotations

import torch

from techniques.fused_kernels.ops import unsupported_reasons
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import (
    Sampler,
    SamplerOutput,
    SamplingMetadata,
    apply_penalties,
    find_logprobs,
)

_MOST = 1 << 24  # whole numbers up to here are exact in fp32; no vocabulary has so many


class FusedSampler(Sampler):
    """Draws what :class:`workbench.slots.sampler.TorchSampler` draws, without sorting.

    Penalties and log-probabilities take that sampler's torch operations, and are counted.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.reset_counters()

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        self._draws += 1
        raw = logits
        if metadata.any_penalties:
            self._penalties += 1
            logits = logits.to(torch.float32, copy=True)
            apply_penalties(logits, metadata)
        token_ids = self._draw(logits, metadata)
        if not metadata.any_logprobs:
            return SamplerOutput(token_ids)
        self._logprobs += 1
        return SamplerOutput(token_ids, find_logprobs(raw, token_ids, metadata.params))

    def _draw(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        if metadata.all_greedy:
            from kernels.triton.argmax import argmax

            return argmax(logits)
        from kernels.triton.sampling import sample

        params = pack(metadata.params, logits.device)
        seeds, positions = metadata.seeds.contiguous(), metadata.positions.contiguous()
        return sample(logits, params, seeds, positions)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return unsupported_reasons(device, dtype)

    def counters(self) -> dict[str, float]:
        return {
            "fused_calls": self._draws,
            "torch_penalty_calls": self._penalties,
            "torch_logprob_calls": self._logprobs,
        }

    def reset_counters(self) -> None:
        self._draws = self._penalties = self._logprobs = 0


def pack(params: list[SamplingParams], device: torch.device) -> torch.Tensor:
    """``[4, L]`` float32 for :func:`kernels.triton.sampling.sample`, without waiting for the
    device."""
    columns = [
        [p.temperature for p in params],
        [min(p.top_k, _MOST) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    is_cuda = device.type == "cuda"
    host = torch.tensor(columns, dtype=torch.float32, pin_memory=is_cuda)
    return host.to(device, non_blocking=is_cuda)
