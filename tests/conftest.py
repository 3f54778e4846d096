"""One torch thread for all tests: tiny models gain nothing from more, and timings vary less.

Nothing is written to the user's cache, and no property fails because the machine is busy. Engines
and runs collect garbage as they start; what imports hold is kept out of that, which would take a
quarter of a second each time.
"""

from __future__ import annotations

import copy
import gc
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import omegaconf.omegaconf
import pytest
import torch
import yaml
from hypothesis import settings

from tests.helpers.collector import spare_the_collector
from workbench.bench import roofline

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collectstart() -> None:
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> None:
    """Collections look at what was made since the module's start, without what is imported."""
    spare_the_collector()


@pytest.fixture(autouse=True)
def cheap_collections_after_imports(cheap_collections: None) -> Iterator[None]:
    before = len(sys.modules)
    yield
    if len(sys.modules) > before:
        spare_the_collector()


@pytest.fixture(scope="session", autouse=True)
def files_parsed_once() -> Iterator[None]:
    """Hydra and the markers parse the same hundred files of ``conf/`` thousands of times. A text
    that was parsed gives a copy of what it gave; one that is wrong is parsed each time."""
    parse = yaml.load
    parsed: dict[str, Any] = {}

    def load(stream: Any, Loader: Any) -> Any:
        if isinstance(stream, str) or not stream.seekable():
            return parse(stream, Loader)
        text = stream.read()
        if text not in parsed:
            stream.seek(0)  # errors name the file
            parsed[text] = parse(stream, Loader)
        return copy.deepcopy(parsed[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omegaconf.omegaconf, "yaml", SimpleNamespace(load=load, dump=yaml.dump))
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where ceilings that tests measure are kept; a process of its own is told by
    ``XDG_CACHE_HOME``."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "user_cache_dir", lambda: folder / "inference-workbench")
        yield folder
