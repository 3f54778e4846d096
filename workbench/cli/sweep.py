"""``-m``: one run a combination, through Hydra's sweeper and launcher.

Hydra splits ``+technique=a,b workload=chat,code_edit`` into jobs and hands them to whatever
launcher is configured (``hydra/launcher=...``); each job composes its own configuration again
from its overrides, so that a job is exactly the run that the same command without ``-m`` makes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from workbench.cli.run import run_command
from workbench.configuration import CONF_DIR, as_model_name
from workbench.core.errors import ConfigError, WorkbenchError


def _job(_: DictConfig) -> int:
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    try:
        status = run_command([str(text) for text in overrides])
    except WorkbenchError as error:  # the other jobs go on
        print(f"error: {error}", file=sys.stderr)
        status = 2
    _STATUSES.append(status)
    return status


_STATUSES: list[int] = []


def sweep_command(arguments: Sequence[str]) -> int:
    """Run every combination; the worst exit status of all."""
    if "output=json" in arguments:
        raise ConfigError(
            "output=json prints one document, a sweep makes several: run the jobs one by one, or "
            "read the records that the sweep writes."
        )
    _STATUSES.clear()
    before = sys.argv
    sys.argv = ["workbench", *map(as_model_name, arguments)]
    try:
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(_job)()
    except SystemExit:  # Hydra has printed what was wrong with the command
        return 2
    finally:
        sys.argv = before
    return max(_STATUSES, default=2)
