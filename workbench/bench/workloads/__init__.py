"""Workloads: which requests a run sends, alike for every engine and on every machine.

Synthetic ones need no data, text ones ship with the project, and others read files by path.
:class:`Workload` is the contract; ``conf/workload/`` has one file for each option.
"""

from __future__ import annotations

from workbench.bench.workloads.base import Workload
from workbench.bench.workloads.files import (
    Gsm8kWorkload,
    HumanEvalWorkload,
    JsonlWorkload,
    MtBenchWorkload,
    SpecBenchWorkload,
)
from workbench.bench.workloads.readers import WorkloadFileError
from workbench.bench.workloads.sharing import MultiTurnWorkload, PrefixHitsWorkload
from workbench.bench.workloads.shipped import TextWorkload, shipped_categories
from workbench.bench.workloads.synthetic import (
    FixedWorkload,
    MixedWorkload,
    Nano256Workload,
    SharedPrefixWorkload,
)
from workbench.bench.workloads.traces import AzureWorkload, MooncakeWorkload
from workbench.core.workload import WorkloadRequest

__all__ = [
    "AzureWorkload",
    "FixedWorkload",
    "Gsm8kWorkload",
    "HumanEvalWorkload",
    "JsonlWorkload",
    "MixedWorkload",
    "MooncakeWorkload",
    "MtBenchWorkload",
    "MultiTurnWorkload",
    "Nano256Workload",
    "PrefixHitsWorkload",
    "SharedPrefixWorkload",
    "SpecBenchWorkload",
    "TextWorkload",
    "Workload",
    "WorkloadFileError",
    "WorkloadRequest",
    "shipped_categories",
]
