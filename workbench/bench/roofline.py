"""What the machine can do at most, measured, and how much of it a run reached.

Decoding reads every weight once a step, so its ceiling is memory bandwidth (MBU); prefill's is
the matmul rate (MFU). Both are measured with torch on the device itself rather than read off a
data sheet, and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from workbench.bench.environment import hardware_slug
from workbench.bench.jsonsafe import to_json

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best rates reached on one device.

    Attributes
    ----------
    copy_bytes_s
        Bytes read plus bytes written a second by a large copy.
    read_bytes_s
        Bytes read a second by reducing a large tensor (the access pattern of decoding).
    matmul_flops
        Floating-point operations a second of a large square matmul, by dtype name.
    """

    device: str
    hardware_slug: str
    torch_version: str
    num_threads: int
    copy_bytes_s: float
    read_bytes_s: float
    matmul_flops: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth_bytes_s(self) -> float:
        """The higher of copy and read bandwidth: what MBU is a share of."""
        return max(self.copy_bytes_s, self.read_bytes_s)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def user_cache_dir() -> Path:
    """Folder for what can be measured again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inference-workbench"


def measure_ceilings(
    device: str | torch.device = "cpu",
    quick: bool = True,
    refresh: bool = False,
    cache_dir: str | Path | None = None,
) -> Ceilings:
    """Measure bandwidth and matmul rates, or take them from the cache.

    Parameters
    ----------
    quick
        About 2 s; otherwise about 15 s, with larger buffers.
    refresh
        Measure again even where the cache has an answer.
    cache_dir
        :func:`user_cache_dir` by default. A folder that cannot be written is no error: the
        measurement is then not kept.
    """
    device = torch.device(device)
    slug, num_threads = hardware_slug(device), torch.get_num_threads()
    folder = Path(cache_dir) if cache_dir is not None else user_cache_dir()
    parts = (slug, f"torch{torch.__version__}", f"t{num_threads}", "quick" if quick else "full")
    path = folder / f"ceilings-v{_VERSION}_{'_'.join(parts)}.json"
    if not refresh:
        cached = _read_cache(path)
        if cached is not None:
            return cached
    found = _measure(device, slug, num_threads, quick)
    _write_cache(path, found)
    return found


def _read_cache(path: Path) -> Ceilings | None:
    try:
        return Ceilings(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(path: Path, found: Ceilings) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(to_json(found.to_dict()))
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _measure(device: torch.device, slug: str, num_threads: int, quick: bool) -> Ceilings:
    is_cpu = device.type == "cpu"
    # Well past the last-level cache of a server (up to 1 GiB on stacked-cache parts in full mode).
    num_bytes = (256 if quick else 1024) * 2**20 if is_cpu else (1 if quick else 4) * 2**30
    seconds = 0.4 if quick else 2.5
    copy_bytes_s, read_bytes_s = _bandwidth(device, num_bytes, seconds)
    dtypes = [torch.float32, torch.bfloat16] + ([] if is_cpu else [torch.float16])
    size = (1024 if quick else 2048) if is_cpu else 8192
    rates = {}
    for dtype in dtypes:
        left = torch.randn(size, size, device=device).to(dtype)
        matmul_s = _best_seconds(lambda x=left: x @ x, device, seconds)  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / matmul_s
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine that sizes its pool by free memory comes next
    return Ceilings(
        device=str(device),
        hardware_slug=slug,
        torch_version=str(torch.__version__),
        num_threads=num_threads,
        copy_bytes_s=copy_bytes_s,
        read_bytes_s=read_bytes_s,
        matmul_flops=rates,
    )


def _bandwidth(device: torch.device, num_bytes: int, seconds: float) -> tuple[float, float]:
    """Copy and read bandwidth in bytes a second, over a buffer of ``num_bytes``."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    side = math.isqrt(len(source))
    square, vector = source[: side * side].view(side, side), torch.ones(side, device=device)
    copy_s = _best_seconds(lambda: target.copy_(source), device, seconds)
    sum_s = _best_seconds(source.sum, device, seconds / 2)
    mv_s = _best_seconds(lambda: square.mv(vector), device, seconds / 2)
    return 2 * num_bytes / copy_s, max(num_bytes / sum_s, square.numel() * 4 / mv_s)


def _best_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the shortest time of ``work`` seen within about ``seconds`` (at least three runs)."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best, runs = float("inf"), 0
    # Several launches a reading, so that the launch itself does not count on a GPU.
    repeats = 1 if device.type == "cpu" else 10
    end = time.perf_counter() + seconds
    while runs < 3 or time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
        runs += 1
    return best


def utilisation(
    counters: Mapping[str, float], wall_s: float, ceilings: Ceilings | None, dtype: str
) -> dict[str, Any] | None:
    """Compare what a run had to move and compute with what the machine can.

    Parameters
    ----------
    counters
        Of one run: ``bytes_moved`` and ``flops`` that it had to do, ``model_seconds`` that the
        model took (the wall time stands in for it, and ``basis`` says so).
    wall_s
        Wall time of the same run.
    dtype
        Name of the matmul dtype, such as ``"bfloat16"``.

    Returns
    -------
    ``mbu`` and ``mfu`` as shares of 1 (None where the counter or ceiling is unknown), the
    achieved rates and ``basis``; None where neither counter is given.
    """
    num_bytes, flops = counters.get("bytes_moved"), counters.get("flops")
    seconds = counters.get("model_seconds") or wall_s
    if (num_bytes is None and flops is None) or not seconds > 0:
        return None
    bandwidth = ceilings.bandwidth_bytes_s if ceilings else None
    rate = ceilings.matmul_flops.get(dtype.removeprefix("torch.")) if ceilings else None
    return {
        "bytes_s": None if num_bytes is None else num_bytes / seconds,
        "flop_s": None if flops is None else flops / seconds,
        "mbu": num_bytes / seconds / bandwidth if num_bytes is not None and bandwidth else None,
        "mfu": flops / seconds / rate if flops is not None and rate else None,
        "seconds": seconds,
        "basis": "model time" if counters.get("model_seconds") else "wall time",
    }
