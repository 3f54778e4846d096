"""Products by whichever algorithm of cuBLASLt is the fastest for their shape, as timed here.

The library ranks its algorithms for a shape by a model of the card, and takes the first. Timed, the
first is often not the fastest: where a product is bound by the card's power, or just above the rows
at which its weight no longer hides behind the memory, others of the few that it proposes gain
several per cent. So they are timed once for a shape, each after the L2 cache was overwritten, and
the fastest is kept for good.

NVIDIA, cuBLAS library documentation, "cublasLtMatmulAlgoGetHeuristic()":
<https://docs.nvidia.com/cuda/cublas/>.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Numbers of the C headers library_types.h, cublas_api.h and cublasLt.h.
_CUDA_R_32F, _CUDA_R_16F, _CUDA_R_16BF = 0, 2, 14
_COMPUTE_32F = 68
_OP_T = 1
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE = 1
_TYPES = {torch.float16: _CUDA_R_16F, torch.bfloat16: _CUDA_R_16BF}

_WORKSPACE_BYTES = 32 << 20
_FLUSHED_BYTES = 128 << 20  # more than any L2 cache
_MOST_ALGORITHMS = 16
_REPEATS = 5
_STEP = 32  # few rows whose algorithms are all timed are multiples of it
#: What another algorithm must gain on the library's first choice to be taken.
_LEAST_GAIN = 0.02
#: Kept for ever, since a captured graph may hold it; launches of one device share it.
_WORKSPACES: dict[torch.device, Tensor] = {}

_Pointer = ctypes.c_void_p


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Found(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class Tuned:
    """What is kept of a shape.

    Attributes
    ----------
    algorithm
        As the library takes it; None where its own choice stays.
    layouts
        Descriptions of weight, rows and output.
    first_us, best_us
        Medians of the library's first choice and of the one taken.
    """

    algorithm: Any
    layouts: tuple[Any, ...]
    first_us: float
    best_us: float


def unavailable_reasons(device: torch.device) -> list[str]:
    """Why cuBLASLt cannot be called for ``device``; empty where it can."""
    if device.type != "cuda":
        return [f"cuBLASLt needs a CUDA device, not {device}"]
    try:
        _load()
    except OSError as error:
        return [f"cuBLASLt, which PyTorch for CUDA brings, was not found: {error}"]
    return []


def _load() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").split(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")  # the one that PyTorch has loaded
    pointers = [_Pointer] * 14
    library.cublasLtMatmul.argtypes = [*pointers, ctypes.c_size_t, _Pointer]
    library.cublasLtMatrixLayoutCreate.argtypes = [
        ctypes.POINTER(_Pointer), ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64,
    ]  # fmt: skip
    return library


class TunedProducts:
    """``x @ weight.T`` by the algorithm that was the fastest for its shape.

    Shapes that come up again and again are timed when they first do, unless a CUDA graph is being
    captured: rows in multiples of 8 up to ``few_rows``, and in multiples of ``many_rows``. Others,
    and what cuBLASLt does not take, are left to the caller.
    """

    def __init__(self, device: torch.device, few_rows: int = 256, many_rows: int = 1024) -> None:
        assert few_rows % _STEP == 0
        self._library = _load()
        self._few_rows, self._many_rows = few_rows, many_rows
        self._handle, self._product = _Pointer(), _Pointer()
        self._preference = _Pointer()
        call = self._call
        call("cublasLtCreate", ctypes.byref(self._handle))
        call("cublasLtMatmulDescCreate", ctypes.byref(self._product), _COMPUTE_32F, _CUDA_R_32F)
        transposed = ctypes.c_int(_OP_T)
        call(
            "cublasLtMatmulDescSetAttribute",
            self._product, _DESC_TRANSA, ctypes.byref(transposed), ctypes.c_size_t(4),
        )  # fmt: skip
        call("cublasLtMatmulPreferenceCreate", ctypes.byref(self._preference))
        size = ctypes.c_uint64(_WORKSPACE_BYTES)
        call(
            "cublasLtMatmulPreferenceSetAttribute",
            self._preference, _PREF_MAX_WORKSPACE, ctypes.byref(size), ctypes.c_size_t(8),
        )  # fmt: skip
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        if device not in _WORKSPACES:
            _WORKSPACES[device] = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._workspace = _WORKSPACES[device]
        self.tuned: dict[tuple[int, ...], Tuned] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")

    def takes(self, num_rows: int) -> bool:
        """Whether products of so many rows are timed."""
        if num_rows <= self._few_rows:
            return num_rows % 8 == 0
        return num_rows % self._many_rows == 0

    def linear(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """``x[T, K] @ weight[N, K].T``, or None where it is the caller's.

        Never waits for the device but when a shape is timed.
        """
        num_rows = x.shape[0]
        if not self.takes(num_rows) or x.dtype not in _TYPES or x.stride(1) != 1:
            return None
        key = (num_rows, *weight.shape, x.stride(0), weight.stride(0), _TYPES[x.dtype])
        found = self.tuned.get(key)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                return None
            found = self._tune(key, weight, x.dtype)
        if found.algorithm is None:
            return None
        out = torch.empty(num_rows, weight.shape[0], dtype=x.dtype, device=x.device)
        self._run(found.algorithm, found.layouts, x, weight, out)
        return out

    def _run(
        self,
        algorithm: _Algorithm,
        layouts: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> int:
        """Launch it; 0 where the library took it."""
        of_weight, of_x, of_out = layouts
        place = out.data_ptr()
        status: int = self._library.cublasLtMatmul(
            self._handle, self._product, ctypes.addressof(self._one),
            weight.data_ptr(), of_weight, x.data_ptr(), of_x, ctypes.addressof(self._zero),
            place, of_out, place, of_out, ctypes.addressof(algorithm),
            self._workspace.data_ptr(), _WORKSPACE_BYTES,
            torch.cuda.current_stream(x.device).cuda_stream,
        )  # fmt: skip
        return status

    def _tune(self, key: tuple[int, ...], weight: Tensor, dtype: torch.dtype) -> Tuned:
        """Time what the library proposes, one after the other and several times over.

        Of rows between multiples of 32, its own choice and what won at the next multiple.
        """
        num_rows, out_features, in_features, stride, *_ = key
        # Its matrices are stored by columns: ours are theirs transposed.
        layouts = (
            self._layout(dtype, in_features, out_features, weight.stride(0)),
            self._layout(dtype, in_features, num_rows, stride),
            self._layout(dtype, out_features, num_rows, out_features),
        )
        algorithms = self._propose(layouts)
        above = -(-num_rows // _STEP) * _STEP
        if num_rows < above <= self._few_rows:
            near = (above, *key[1:])
            winner = (self.tuned.get(near) or self._tune(near, weight, dtype)).algorithm
            algorithms = [*algorithms[:1], *([] if winner is None else [winner])]
        # What the caller's rows hold does not matter, but zeros would take less power.
        x = torch.empty(num_rows, stride, dtype=dtype, device=weight.device).normal_()
        out = torch.empty(num_rows, out_features, dtype=dtype, device=weight.device)
        times = self._time(algorithms, layouts, x, weight, out)
        found = Tuned(None, layouts, 0.0, 0.0)
        if times:
            usable = sorted(times, key=lambda place: times[place])
            first, best = times.get(0, times[usable[0]]), times[usable[0]]
            is_better = usable[0] != 0 and best <= (1 - _LEAST_GAIN) * first
            algorithm = algorithms[usable[0]] if is_better else None
            found = Tuned(algorithm, layouts, first, best if is_better else first)
        self.tuned[key] = found
        return found

    def _time(
        self,
        algorithms: Sequence[_Algorithm],
        layouts: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> dict[int, float]:
        """Median microseconds of those that the library takes, by their places."""
        usable = [
            place
            for place, algorithm in enumerate(algorithms)
            if self._run(algorithm, layouts, x, weight, out) == 0
        ]
        flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
        make_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
        events: dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        for place in usable * _REPEATS:  # in turn, so that all meet the same clock
            flushed.zero_()
            begin, end = (make_event(enable_timing=True) for _ in "ab")
            begin.record()
            self._run(algorithms[place], layouts, x, weight, out)
            end.record()
            events.setdefault(place, []).append((begin, end))
        torch.cuda.current_stream(x.device).synchronize()
        return {
            place: statistics.median(b.elapsed_time(e) * 1e3 for b, e in pairs)
            for place, pairs in events.items()
        }

    def _layout(self, dtype: torch.dtype, rows: int, columns: int, stride: int) -> Any:
        layout = _Pointer()
        self._call(
            "cublasLtMatrixLayoutCreate", ctypes.byref(layout), _TYPES[dtype], rows, columns, stride
        )
        return layout

    def _propose(self, layouts: tuple[Any, ...]) -> list[_Algorithm]:
        """The library's algorithms for a shape, its own choice first."""
        found = (_Found * _MOST_ALGORITHMS)()
        count = ctypes.c_int()
        of_weight, of_x, of_out = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle, self._product, of_weight, of_x, of_out, of_out, self._preference,
            _MOST_ALGORITHMS, found, ctypes.byref(count),
        )  # fmt: skip
        # Copies: what the array holds goes with it.
        return [
            _Algorithm.from_buffer_copy(f.algorithm) for f in found[: count.value] if f.state == 0
        ]
