"""Norms and gated activations as torch.compile's Inductor fuses them."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from kernels.norm import rms_norm_reference
from techniques.fused_kernels.ops import unsupported_reasons as triton_reasons
from techniques.torch_compile.graphs import CompiledFunction
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.slots.ops import DispatchedOps

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class CompiledOpsConfig:
    """Options of :class:`CompiledOps`.

    Attributes
    ----------
    emulate_precision_casts
        Round between fused operations where PyTorch rounds without a compiler. Off, what one kernel
        does stays in fp32 until its end.
    max_graphs
        Most graphs that an engine may compile; one more is an error.
    """

    emulate_precision_casts: bool = True
    max_graphs: int = 16


class CompiledOps(DispatchedOps):
    """The references of ``kernels``, compiled: one graph for each op and form of tensors.

    Graphs are kept for the life of the process, and engines of equal shapes share them.
    """

    Config = CompiledOpsConfig
    config: CompiledOpsConfig

    def __init__(self, config: CompiledOpsConfig | None = None) -> None:
        super().__init__(config)
        if self.config.max_graphs < 1:
            raise ConfigError(f"engine.ops.max_graphs={self.config.max_graphs} must be 1 or more.")
        self._used: dict[tuple[object, ...], CompiledFunction] = {}
        self.reset_counters()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
    ) -> torch.Tensor:
        self._norms += 1
        if not x.shape[0]:
            return super().rms_norm(x, weight, eps, offset=offset)
        out: Tensor = self._find("rms_norm", eps, offset, x)(x, weight, rows=1)
        return out

    def add_rms_norm_(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
    ) -> torch.Tensor:
        self._added_norms += 1
        if not x.shape[0]:
            return super().add_rms_norm_(x, residual, weight, eps, offset=offset)
        found = self._find("add_rms_norm", eps, offset, x, residual)
        out: Tensor = found(x, residual, weight, rows=2)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._activate("silu_and_mul", gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._activate("gelu_tanh_and_mul", gate_up)

    def _activate(self, name: str, gate_up: Tensor) -> Tensor:
        self._activations += 1
        if not gate_up.shape[0]:
            return gate_up.new_empty(0, gate_up.shape[1] // 2)
        out: Tensor = self._find(name, 0.0, 0.0, gate_up)(gate_up, rows=1)
        return out

    def _find(self, name: str, eps: float, offset: float, *tensors: Tensor) -> CompiledFunction:
        """The function for an op, its constants and all of the tensors' form but their ``T``."""
        first = tensors[0]
        form = tuple((*t.shape[1:], t.stride()) for t in tensors)
        # torch's state is guarded too. Threads are, because loops on a CPU are cut by their number.
        state = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), _num_threads(first))
        key = (name, eps, offset, first.dtype, first.device, form, state)
        found = self._used.get(key)
        if found is None:
            if len(self._used) >= self.config.max_graphs:
                raise UnsupportedError(self._too_many(key))
            rounds = self.config.emulate_precision_casts
            found = self._used[key] = _compiled(name, eps, offset, rounds, key)
        self._ran.add(found)
        return found

    def _too_many(self, key: tuple[object, ...]) -> str:
        forms = "; ".join(str(k) for k in (*self._used, key))
        return (
            f"ops CompiledOps has compiled {len(self._used)} graphs, engine.ops.max_graphs of "
            "them, and would need another: tensors keep changing their form (by op, eps, offset, "
            f"dtype, device, sizes and strides, and torch's state: {forms}). Raise "
            "engine.ops.max_graphs if so many are right, or take engine/ops=dispatched."
        )

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        if device.type == "cuda":
            return triton_reasons(device, dtype)
        reasons = _compiler_reasons()
        if dtype not in _DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            reasons.append(f"{str(dtype).removeprefix('torch.')} is none of {known}")
        return reasons

    def counters(self) -> dict[str, float]:
        return {
            "rms_norm_calls": self._norms,
            "add_rms_norm_calls": self._added_norms,
            "activation_calls": self._activations,
            "graphs": len(self._ran),
        }

    def reset_counters(self) -> None:
        self._norms = self._added_norms = self._activations = 0
        self._ran: set[CompiledFunction] = set()


def _num_threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.is_cpu else 0


@functools.cache
def _compiled(
    name: str, eps: float, offset: float, rounds: bool, key: tuple[object, ...]
) -> CompiledFunction:
    """One function for the process; ``key`` tells apart what its graph is made for."""

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, eps, offset=offset)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        torch._check(x.shape[0] == residual.shape[0])  # type: ignore[no-untyped-call]
        residual.add_(x)
        return rms_norm_reference(residual, weight, eps, offset=offset)

    def silu_and_mul(gate_up: Tensor) -> Tensor:
        return silu_and_mul_reference(gate_up)

    def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
        return gelu_tanh_and_mul_reference(gate_up)

    functions: dict[str, Callable[..., Tensor]] = {
        f.__name__: f for f in (rms_norm, add_rms_norm, silu_and_mul, gelu_tanh_and_mul)
    }
    # Without the compiler's pool of processes, which would outlive three small kernels.
    options: dict[str, Any] = {"emulate_precision_casts": rounds, "compile_threads": 1}
    return CompiledFunction(functions[name], name, options)


@functools.cache
def _missing_for_cpp() -> str | None:
    """What Inductor's C++ for a CPU lacks here, if anything."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"torch.compile finds no C++ compiler ({error}): install g++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "torch.compile needs Python.h on a CPU: install Python's development files"
    return None


def _compiler_reasons() -> list[str]:
    reason = _missing_for_cpp()
    return [] if reason is None else [reason]
