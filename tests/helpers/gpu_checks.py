"""Runs the checks of a GPU test file, under pytest or where there is none."""

from __future__ import annotations

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
    """Every check, a line each; the exit status is 1 where one failed."""
    failed = False
    for name, check in checks.items():
        began, verdict = time.perf_counter(), "ok"
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed, verdict = True, "FAILED"
        print(f"{name}: {verdict} ({time.perf_counter() - began:.1f} s)", flush=True)
    return int(failed)
