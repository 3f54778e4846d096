"""What a measurement ran on: machine, driver, libraries, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "triton": "triton",
    "numba": "numba",
    "numpy": "numpy",
    "flashinfer": "flashinfer-python",
    "flash-attn": "flash-attn",
    "vllm": "vllm",
    "sglang": "sglang",
    "hydra-core": "hydra-core",
}


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the software of one run.

    Attributes
    ----------
    hardware_slug
        Short name for file names: the GPU where one is used, the CPU otherwise.
    num_cpus
        Cores that this process may use.
    packages
        Installed versions by name; what is absent is left out.
    git_commit, git_dirty
        Of the checkout that the code runs from. Records under ``results/`` do not count as changes.
        For a copy that was sent to another machine, the environment variable ``WORKBENCH_COMMIT``
        names the commit that was copied; whether the copy has changes is then unknown (None).
    """

    hardware_slug: str
    device: str
    cpu: str
    num_cpus: int
    ram_bytes: int
    gpus: list[str]
    gpu_driver: str | None
    cuda: str | None
    os: str
    python: str
    num_threads: int
    num_interop_threads: int
    packages: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def collect_environment(
    device: str | torch.device = "cpu", repository: str | Path | None = None
) -> Environment:
    """Look at the machine.

    Parameters
    ----------
    device
        What the run uses; decides which hardware names the record.
    repository
        Folder whose commit is stated; the one that this code lies in by default.
    """
    device = torch.device(device)
    commit, is_dirty = git_state(Path(repository) if repository else Path(__file__).parent)
    gpus, driver = _gpus()
    return Environment(
        hardware_slug=hardware_slug(device),
        device=str(device),
        cpu=cpu_name(),
        num_cpus=num_usable_cpus(),
        ram_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        gpu_driver=driver,
        cuda=torch.version.cuda,
        os=platform.platform(),
        python=platform.python_version(),
        num_threads=torch.get_num_threads(),
        num_interop_threads=torch.get_num_interop_threads(),
        packages=package_versions(),
        git_commit=commit,
        git_dirty=is_dirty,
    )


def hardware_slug(device: str | torch.device) -> str:
    """Short name of the hardware, such as ``nvidia-h100-80gb-hbm3`` or ``amd-epyc-9r14_2c``."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return _slug(f"{device.type}-{platform.node()}")
    return f"{_slug(cpu_name())}_{num_usable_cpus()}c"


def _slug(text: str) -> str:
    text = re.sub(r"\((?:r|tm|c)\)|@.*$|\bprocessor\b|\bcpu\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def cpu_name() -> str:
    """Model name of the CPU as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def num_usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide speed, without importing them."""
    versions = {}
    for name, distribution in _PACKAGES.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    # The build tag (+cpu, +cu130) is only in the module.
    versions["torch"] = str(torch.__version__)
    return versions


def _gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs that torch sees, and the driver version as NVML tells it."""
    if not torch.cuda.is_available():
        return [], None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            driver = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no NVML (ROCm, a container without it): the driver stays unknown
        return names, None
    return names, driver.decode() if isinstance(driver, bytes) else str(driver)


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that ``folder`` lies in and whether it has changes.

    What ``WORKBENCH_COMMIT`` names goes first, with changes unknown: a copy may have brought an
    older ``.git`` along. ``(None, None)`` outside a checkout, without git, or before the first
    commit.
    """
    if named := os.environ.get("WORKBENCH_COMMIT"):
        return named, None
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git(Path(top), "status", "--porcelain", "--", ".", ":(exclude)results")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
