"""Every Triton kernel builds for compute capabilities 8.0 and 9.0. No GPU is needed.

In a process without ``TRITON_INTERPRET``, under which kernels are Python functions.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

import kernels.triton
from tests.helpers.interpreted import ROOT, needs_triton

pytestmark = needs_triton

#: Builds the examples of one module and reports them. The first one of each kernel is built for
#: every capability, the others for the newest.
BUILD = """
import json, sys
from kernels.triton import compile_ahead as ahead

for module in ahead.example_modules():
    seen = {}
    for name, launch in ahead.launches_of(module):
        seen[launch.name] = seen.get(launch.name, 0) + 1
        capabilities = ahead.CAPABILITIES if seen[launch.name] == 1 else ahead.CAPABILITIES[-1:]
        for capability in capabilities:
            built = ahead.compile_launch(launch, capability)
            print(json.dumps({
                "module": module, "kernel": launch.name, "example": name, "capability": capability,
                "cubin": len(built.asm["cubin"]), "shared": built.metadata.shared,
                "target": f".target sm_{capability}" in built.asm["ptx"],
            }), flush=True)
"""
#: Shared memory that a program may take on the smallest card of a capability.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels_of(module: str) -> set[str]:
    """Names of the kernels that a module defines: what it decorates and names so."""
    found = vars(importlib.import_module(module)).items()
    return {
        name
        for name, value in found
        if name.endswith("_kernel") and getattr(value, "__module__", "") == module
    }


def test_every_kernel_is_built_for_every_capability(built: list[dict[str, object]]) -> None:
    names = [m.name for m in pkgutil.iter_modules(kernels.triton.__path__, "kernels.triton.")]
    expected = {kernel for module in names for kernel in kernels_of(module)}
    assert len(expected) >= 4, expected
    for capability in SHARED_BYTES:
        done = {one["kernel"] for one in built if one["capability"] == capability}
        assert done == expected, f"no example launches {expected - done} (sm_{capability})"


def test_what_is_built_is_machine_code_that_fits_the_card(built: list[dict[str, object]]) -> None:
    for one in built:
        assert one["target"], one
        assert int(str(one["cubin"])) > 1000, one
        assert int(str(one["shared"])) <= SHARED_BYTES[int(str(one["capability"]))], one


def test_a_kernel_that_does_not_build_is_noticed() -> None:
    code = """
import torch, triton, triton.language as tl
from kernels.triton.compile_ahead import compile_launch, record_launches
import kernels.triton.merge as merge

with record_launches() as launches:
    merge.example_launches()["bf16"]()
launch = launches[0]
launch.arguments["ROWS"] = 3  # no power of two: tl.arange refuses it
compile_launch(launch, 90)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "power of 2" in done.stderr
