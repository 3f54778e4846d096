"""What the Hugging Face baselines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.baselines.hf_model import (
    SharedModel,
    acquire,
    quiet_transformers,
    release,
    versions,
)
from workbench.baselines.intake import Intake, RequestLimits
from workbench.core.backend import BackendInfo, MemoryLedger, RequestSource, TokenEvent
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest


class HfBackend(ABC):
    """A Hugging Face Transformers model behind the ``Backend`` protocol; decoding is greedy.

    Baselines of the same model, dtype, device and weights in one process share one loaded copy.

    Parameters
    ----------
    model_path
        Folder with the model.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    device
        ``cpu``, ``cuda``, ``cuda:1``, ...
    weights, seed
        ``checkpoint``, or ``random`` weights of the config's shape, drawn with ``seed``.
    attn_implementation
        A name that transformers knows: ``sdpa``, ``eager``, ``flash_attention_2``, ...
    max_model_len
        Most tokens of prompt and output together; None takes the model's context.
    name
        What the baseline is called in records.

    Raises
    ------
    ConfigError
        The model cannot be loaded, or an option is not valid.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        name: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "checkpoint",
        seed: int = 0,
        attn_implementation: str = "sdpa",
        max_model_len: int | None = None,
    ) -> None:
        self.name = name
        self._shared: SharedModel | None = acquire(model_path, dtype, device, weights, seed)
        try:
            self._limits = self._resolve_limits(self._shared.limits, max_model_len)
            self._shared.use_attention(attn_implementation)
        except (ValueError, ImportError) as error:
            self.close()
            raise ConfigError(str(error)) from error
        self._attn_implementation = attn_implementation
        self._model_path = str(model_path)
        self._intake: Intake | None = None
        self._run_peak_bytes: int | None = None
        self._reset_counters()

    @staticmethod
    def _resolve_limits(limits: RequestLimits, max_model_len: int | None) -> RequestLimits:
        if max_model_len is None:
            return limits
        if not 1 <= max_model_len <= limits.max_model_len:
            raise ConfigError(
                f"max_model_len={max_model_len} is not valid: it must be between 1 and the "
                f"model's context of {limits.max_model_len}."
            )
        return RequestLimits(limits.vocab_size, max_model_len)

    @property
    def shared(self) -> SharedModel:
        """The loaded model.

        Raises
        ------
        RuntimeError
            The backend was closed.
        """
        if self._shared is None:
            raise RuntimeError(f"baseline {self.name!r} was closed.")
        return self._shared

    def info(self) -> BackendInfo:
        """Version, attention implementation in use, precision and device."""
        return BackendInfo(
            name=self.name,
            version=versions(),
            attention=self._attention_in_use(),
            dtype=self.shared.dtype,
            device=str(self.shared.device),
            details={
                "model": self._model_path,
                "weights": self.shared.weights,
                "seed": self.shared.seed,
                "max_model_len": self._limits.max_model_len,
                "num_threads": torch.get_num_threads(),
                **self._details(),
            },
        )

    def prepare(  # noqa: B027 - having nothing to prepare is the common case
        self, requests: Sequence[WorkloadRequest], max_concurrency: int | None = None
    ) -> None:
        """Get ready for a workload, outside of any timing; calling it is optional.

        Parameters
        ----------
        requests
            The workload's requests, in order.
        max_concurrency
            Most requests that the load keeps in flight; None if it has no bound.
        """

    def run(self, source: RequestSource, on_event: Callable[[TokenEvent], None]) -> None:
        """Serve every request of ``source``; see ``workbench.core.backend.Backend.run``."""
        probe = self.shared.probe
        self.shared.use_attention(self._attn_implementation)
        self._reset_counters()
        self._intake = Intake(source, on_event, self._limits)
        probe.trim()
        probe.reset_peak()
        start_bytes = probe.current_bytes()
        try:
            with quiet_transformers():
                self._serve(self._intake)
        finally:
            self._run_peak_bytes = max(0, probe.peak_bytes() - start_bytes)
            self._end_run()
            self.shared.use_attention(self._attn_implementation)

    def counters(self) -> dict[str, float]:
        """Counters since the last ``run`` began.

        ``steps``
            Forward passes of the model.
        ``prompt_tokens``, ``output_tokens``
            Of accepted requests; output is what was told to the caller.
        ``padded_prompt_tokens``
            Padding that was computed beside the prompts.
        ``wasted_tokens``
            Tokens that were generated for a request after its end, and thrown away.
        ``failed_requests``
            Requests told as errors.
        """
        intake = self._intake
        return {
            "steps": float(self._num_steps),
            "prompt_tokens": float(intake.num_prompt_tokens if intake else 0),
            "output_tokens": float(intake.num_output_tokens if intake else 0),
            "padded_prompt_tokens": float(self._num_padded_prompt_tokens),
            "wasted_tokens": float(self._num_wasted_tokens),
            "failed_requests": float(intake.num_errors if intake else 0),
        }

    def memory(self) -> MemoryLedger | None:
        """Measured bytes of the last ``run``: the model, and the run's peak above its start.

        What several baselines share is counted once for each of them, as if it ran alone.
        Nothing is predicted: the allocations are the library's own.
        """
        if self._run_peak_bytes is None:
            return None
        return MemoryLedger(
            predicted={},
            measured_peak_bytes=self.shared.model_bytes + self._run_peak_bytes,
            base_bytes=self.shared.base_bytes,
            kv_allocated_tokens=self._kv_allocated_tokens,
            kv_used_tokens=self._kv_used_tokens,
        )

    def close(self) -> None:
        """Free the model, unless another baseline still uses it. Closing twice is harmless."""
        if self._shared is not None:
            shared, self._shared = self._shared, None
            release(shared)

    def _reset_counters(self) -> None:
        self._num_steps = 0
        self._num_padded_prompt_tokens = 0
        self._num_wasted_tokens = 0
        self._kv_allocated_tokens = 0
        self._kv_used_tokens = 0

    def _count_kv(self, allocated_tokens: int, used_tokens: int) -> None:
        """Remember the moment of highest use."""
        if used_tokens > self._kv_used_tokens:
            self._kv_allocated_tokens = allocated_tokens
            self._kv_used_tokens = used_tokens

    def _attention_in_use(self) -> str:
        return self._attn_implementation

    def _details(self) -> dict[str, Any]:
        """Options of the subclass, resolved."""
        return {}

    @abstractmethod
    def _serve(self, intake: Intake) -> None:
        """Serve until ``intake.is_done``."""

    def _end_run(self) -> None:  # noqa: B027 - most leave nothing
        """Drop what the run left on the model."""
