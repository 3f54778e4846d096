"""Picks a backend for steps of single tokens and one for all others, by what was measured."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

from kernels.attention import MAX_DECODE_QUERIES
from techniques.attention import CountingAttention, Phase
from techniques.auto_attention.measured import CLASSES, ranking
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionBackend, AttentionLayer, CudaGraphSupport, TokenTrees
from workbench.slots.kv_pool import KVPool

_LOG = logging.getLogger(__name__)
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class AutoMetadata:
    """Which backend serves the step, and its metadata."""

    phase: Phase
    name: str
    inner: Any


class AutoAttention(CountingAttention):
    """Delegates to the first backend of a ranking that can serve the model.

    Which one that is for each kind of step stands in :attr:`picks`, in :meth:`describe` and in the
    counters; why others were passed over in :attr:`passed_over`. Token trees go to the first that
    knows them.
    """

    supports_trees = True

    def __init__(self, config: Any = None) -> None:
        self.picks: dict[Phase, str] = {}
        self.passed_over: dict[str, list[str]] = {}
        self._backends: dict[str, AttentionBackend] = {}
        self._for_trees = ""
        super().__init__(config)

    @property
    def cudagraph_support(self) -> CudaGraphSupport:  # type: ignore[override]
        """What all picked backends support; else what the one for a few tokens a request does."""
        picked = {p: self._backends[name].cudagraph_support for p, name in self.picks.items()}
        if not picked:
            return CudaGraphSupport.NEVER
        few = min(picked["decode"], CudaGraphSupport.UNIFORM_BATCH)
        return max(min(picked.values()), few)

    def describe(self) -> str:
        """What was picked: ``AutoAttention (decode triton, prefill flash_attn)``."""
        picks = ", ".join(f"{phase} {name}" for phase, name in self.picks.items())
        return f"{super().describe()} ({picks})"

    def build_metadata(self, batch: ForwardBatch) -> AutoMetadata:
        # A few queries a request, as drafts have, read far more keys than they do arithmetic:
        # what is fastest for single tokens is fastest for them.
        phase: Phase = "decode" if batch.max_query_len <= MAX_DECODE_QUERIES else "prefill"
        name = self._for_trees if TokenTrees in batch.extras else self.picks[phase]
        return AutoMetadata(phase, name, self._backends[name].build_metadata(batch))

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: AutoMetadata, pool: KVPool
    ) -> torch.Tensor:
        self.count(metadata.phase)
        self._calls[f"{metadata.name}_calls"] += 1
        return self._backends[metadata.name].forward(q, layer, metadata.inner, pool)

    def reset_counters(self) -> None:
        super().reset_counters()
        for name in dict.fromkeys([*self.picks.values(), *filter(None, [self._for_trees])]):
            self._calls[f"{name}_calls"] = 0
            self._backends[name].reset_counters()

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        """Pick for every kind of step; reasons only where nothing at all can serve it."""
        device = pool.layer(0)[0].device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.picks, self.passed_over, self._backends = {}, {}, {}
        for phase in PHASES:
            for name in ranking(capability, phase):
                if self._serves(name, layers, pool):
                    self.picks[phase] = name
                    break
        self._for_trees = next(
            (
                name
                for name in ranking(capability, "decode")
                if self._serves(name, layers, pool) and self._backends[name].supports_trees
            ),
            "",
        )
        self.reset_counters()
        for name, why in self.passed_over.items():
            _LOG.info("attention: not %s: %s", name, "; ".join(why))
        missing = [phase for phase in PHASES if phase not in self.picks]
        return [
            f"no backend serves steps of kind {phase}: "
            + "; ".join(f"{name}: {', '.join(why)}" for name, why in self.passed_over.items())
            for phase in missing
        ]

    def _serves(self, name: str, layers: list[AttentionLayer], pool: KVPool) -> bool:
        """Whether a backend can; built and asked once."""
        if name not in self._backends:
            self._backends[name] = _build(name)
            reasons = self._backends[name].unsupported_reasons(layers, pool)
            if reasons:
                self.passed_over[name] = reasons
        return name not in self.passed_over


def _build(name: str) -> AttentionBackend:
    module, _, attribute = CLASSES[name].rpartition(".")
    backend: AttentionBackend = getattr(importlib.import_module(module), attribute)()
    return backend
