"""Triton's kernels in tests: on a GPU as they are, elsewhere in Triton's interpreter.

Triton decides when it is imported whether kernels are Python functions (``TRITON_INTERPRET=1``), so
a file of tests starts itself again in a process of its own:

    pytestmark = needs_kernels

    def test_in_the_interpreter() -> None:
        run_in_interpreter(__file__)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch

from kernels.triton import HAS_TRITON, is_interpreted

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU and not is_interpreted() else "cpu")
ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_kernels = pytest.mark.skipif(
    not (is_interpreted() or (HAS_TRITON and HAS_GPU)),
    reason="runs on a GPU, or in the process that test_in_the_interpreter starts",
)
#: On the one test that starts the process.
starts_interpreter = pytest.mark.skipif(
    is_interpreted() or HAS_GPU or not HAS_TRITON,
    reason="Triton is not installed, interprets already, or has a GPU to run on",
)


def _patch_language_once() -> None:
    """Let the interpreter put its functions into ``triton.language`` once for each module.

    It does so at every call between functions of a kernel, even of ``tl.sum``, by a look at each
    member of the language: most of the time that a kernel takes. Nothing in this process needs the
    language as it was, since all kernels are interpreted.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[str] = set()
    keep = SimpleNamespace(restore=lambda: None)

    def patch_once(fn: FunctionType) -> SimpleNamespace:
        if fn.__module__ not in patched:
            patch(fn)
            patched.add(fn.__module__)
        return keep

    interpreter._patch_lang = patch_once


if HAS_TRITON and is_interpreted():
    _patch_language_once()


def run_in_interpreter(file: str, *options: str) -> None:
    """Run the tests of ``file`` in a process where Triton interprets its kernels.

    All must run but one, the test that calls this.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options, file]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    # The interpreter multiplies tiles with numpy. OpenBLAS's kernels for AVX2 round a row by its
    # place in the tile, which no GPU does, and tests of equal bits would see; these do not.
    env["OPENBLAS_CORETYPE"] = "Nehalem"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stdout[-6000:] + done.stderr[-2000:], pytrace=False)
    results = "".join(line for line in done.stdout.splitlines() if line.endswith("%]"))
    assert "." in results, f"nothing ran: {done.stdout}"
    assert results.count("s") <= 1, f"some were skipped: {done.stdout}"
