"""One thread pool for torch and numba, or none for numba.

torch and numba's ``omp`` layer both use OpenMP. torch is loaded first, with global visibility, so
the layer binds to torch's copy of the run-time and the two share their threads. Any other layer
would be a second pool whose threads compete with torch's spinning ones: without a shared pool the
kernels run on the calling thread alone.
"""

from __future__ import annotations

import functools
import threading
from ctypes import CFUNCTYPE, c_int

import numba
import torch


@functools.cache
def shares_torch_pool() -> bool:
    """Start numba's OpenMP layer, and find out whether it drives torch's threads."""
    try:
        from numba.np.ufunc import omppool
    except ImportError:
        return False
    set_default = CFUNCTYPE(None, c_int)(omppool.launch_threads)  # omp_set_num_threads
    before = torch.get_num_threads()
    set_default(before + 1)
    is_shared = torch.get_num_threads() == before + 1
    set_default(before)
    if is_shared:
        previous, numba.config.THREADING_LAYER = numba.config.THREADING_LAYER, "omp"
        numba.get_num_threads()  # starts the layer, unless the process has started one already
        numba.config.THREADING_LAYER = previous
        set_default(before)
    return is_shared and numba.threading_layer() == "omp"


_local = threading.local()


def num_threads() -> int:
    """Threads that a kernel called next may use: torch's number, or 1 without a shared pool."""
    wanted = torch.get_num_threads()
    if wanted == 1 or not shares_torch_pool():
        return 1
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if getattr(_local, "count", 0) != count:  # numba keeps its number by thread
        numba.set_num_threads(count)
        _local.count = count
    return count
