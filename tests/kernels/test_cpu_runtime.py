"""Where the CPU kernels run: on torch's own threads or on one, and from disk the second time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, cache: Path) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numba")


NORM = """
import os, sys
import torch
torch.set_num_threads(2)
{before}
from kernels import rms_norm, dispatch
from kernels.cpu import norm, threads
def count():
    return len(os.listdir("/proc/self/task"))
torch.ones(1 << 20).exp()
with_torch = count()
x = torch.randn(4096, 64)
out = rms_norm(x, torch.ones(64), 1e-5)
truth = torch.nn.functional.rms_norm(x, (64,), torch.ones(64), 1e-5)
torch.testing.assert_close(out, truth)
owner = norm._rms_norm._compiled[torch.float32][2]
print(threads.num_threads(), count() - with_torch, torch.get_num_threads(), owner.cache_hits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_use_the_threads_of_torch_and_the_disk(cache: Path) -> None:
    first = run(NORM.format(before=""), cache).split()
    second = run(NORM.format(before=""), cache).split()
    assert first == ["2", "0", "2", "0"]
    assert second == ["2", "0", "2", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    "before",
    [
        "sys.modules['numba.np.ufunc.omppool'] = None",
        "import numba; numba.config.THREADING_LAYER = 'workqueue'; numba.get_num_threads()",
    ],
    ids=["no_openmp", "another_layer"],
)
def test_without_a_shared_pool_kernels_run_on_one_thread(before: str, cache: Path) -> None:
    number, more_threads, of_torch, _ = run(NORM.format(before=before), cache).split()
    assert (number, of_torch) == ("1", "2")
    assert int(more_threads) == 0


def test_importing_the_ops_does_not_import_numba(cache: Path) -> None:
    code = "import sys, kernels; print('numba' in sys.modules)"
    assert run(code, cache) == "False"


def test_without_numba_the_reference_serves(cache: Path) -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "numba" else find(name, *a)
import sys, torch
from kernels import dispatch, silu_and_mul
from kernels.activation import silu_and_mul_reference
x = torch.randn(3, 8)
assert torch.equal(silu_and_mul(x), silu_and_mul_reference(x))
print("kernels.cpu" in sys.modules, dispatch.describe_cpu())
"""
    assert run(code, cache).startswith("False torch ops")


def test_without_a_folder_to_write_to_kernels_are_compiled_anyway(cache: Path) -> None:
    code = """
import warnings
from numba.core import caching
def refuse(*arguments):
    raise RuntimeError("cannot cache function: no locator available")
caching.FunctionCache.__init__ = refuse
import torch
from kernels import rms_norm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0)
print(out.tolist(), [str(w.message)[:18] for w in caught])
"""
    assert run(code, cache) == "[[1.0, 1.0, 1.0, 1.0]] ['no writable folder']"
