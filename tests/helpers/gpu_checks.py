"""Runs the checks of a GPU test file, under pytest or where there is none."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping

import torch

Checks = Mapping[str, Callable[[], object]]


def run_under_pytest(checks: Checks) -> None:
    """Every check in turn; skipped without a CUDA device."""
    import pytest

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for check in checks.values():
        check()


def run_as_program(checks: Checks) -> int:
    """The checks that the command line names, or all, a line each; the exit status is 1 where one
    failed, and 2 where there is none of a name."""
    named = sys.argv[1:] or list(checks)
    unknown = [name for name in named if name not in checks]
    if unknown:
        print(f"no check is called {', '.join(unknown)}: there are {', '.join(checks)}")
        return 2
    failed = False
    for name in named:
        check = checks[name]
        began, verdict = time.perf_counter(), "ok"
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed, verdict = True, "FAILED"
        print(f"{name}: {verdict} ({time.perf_counter() - began:.1f} s)", flush=True)
    return int(failed)
