"""Inference workbench: one engine in which every optimisation is a part that can be taken out.

>>> from workbench import SamplingParams, build_engine
>>> engine = build_engine(max_model_len=1024)  # doctest: +SKIP
>>> engine.generate("The capital of France is", SamplingParams(max_tokens=8))  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.core.sampling import SamplingParams

if TYPE_CHECKING:
    from workbench.api import build_engine

__version__ = "0.1.0"
__all__ = ["SamplingParams", "__version__", "build_engine"]


def __getattr__(name: str) -> Any:
    if name == "build_engine":  # imported on first use: it loads every room
        from workbench.api import build_engine

        return build_engine
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
