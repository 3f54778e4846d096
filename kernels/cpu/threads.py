"""One thread pool for torch and numba, or none for numba.

torch and numba's ``omp`` layer both use OpenMP. torch is loaded first, with global visibility, so
the layer binds to torch's copy of the run-time and the two share their threads. Any other layer
would be a second pool whose threads compete with torch's spinning ones: without a shared pool the
kernels run on the calling thread alone.
"""

from __future__ import annotations

import functools
import importlib
import threading
from ctypes import CFUNCTYPE, c_int
from typing import Any

import numba
import torch

_config: Any = numba.config


@functools.cache
def shares_torch_pool() -> bool:
    """Start numba's OpenMP layer, and find out whether it drives torch's threads."""
    try:
        omppool = importlib.import_module("numba.np.ufunc.omppool")  # an extension without stubs
    except ImportError:
        return False
    set_default = CFUNCTYPE(None, c_int)(omppool.launch_threads)  # omp_set_num_threads
    before = torch.get_num_threads()
    set_default(before + 1)
    is_shared = torch.get_num_threads() == before + 1
    set_default(before)
    if is_shared:
        previous, _config.THREADING_LAYER = _config.THREADING_LAYER, "omp"
        numba.get_num_threads()  # starts the layer, unless the process has started one already
        _config.THREADING_LAYER = previous
        set_default(before)
    return is_shared and numba.threading_layer() == "omp"


_local = threading.local()


def num_threads() -> int:
    """Threads that a kernel called next may use: torch's number, or 1 without a shared pool."""
    wanted = torch.get_num_threads()
    if wanted == 1 or not shares_torch_pool():
        return 1
    count = min(wanted, _config.NUMBA_NUM_THREADS)
    if getattr(_local, "count", 0) != count:  # numba keeps its number by thread
        numba.set_num_threads(count)
        _local.count = count
    return count
