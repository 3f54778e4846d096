"""Outputs scored by Transformers as the reference: what such a gate must not let through."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from workbench.bench.progress import NoProgress
from workbench.bench.run import Variant
from workbench.cli.reference import HfReference, scored
from workbench.cli.run import _engine_reference
from workbench.core.backend import TokenEvent
from workbench.core.errors import WorkbenchError
from workbench.core.workload import WorkloadRequest

EPSILON = 1.0


class Margins:
    """Transformers, as far as a score needs it."""

    def __init__(self, margins: Sequence[float]) -> None:
        self._margins = margins

    def margins(self, request_id: str, tokens: Sequence[int]) -> Sequence[float]:
        return self._margins[: len(tokens)]


def score(
    tokens: Sequence[int], margins: Sequence[float], ignore_eos: bool = True
) -> dict[str, Any]:
    request = WorkloadRequest("r0", (1, 2), 3, ignore_eos=ignore_eos)
    hf = cast(HfReference, Margins(margins))
    outputs = scored(lambda requests: {"r0": tuple(tokens)}, hf, EPSILON, NoProgress())
    return dict(outputs([request]))


def test_outputs_that_transformers_stands_by_are_the_reference() -> None:
    assert score((7, 8, 9), (0.0, EPSILON, 0.5)) == {"r0": (7, 8, 9)}
    # One that may end early may be short.
    assert score((7, 8), (0.0, 0.0), ignore_eos=False) == {"r0": (7, 8)}


@pytest.mark.parametrize(
    ("margins", "position"),
    [((0.0, 1.5, 0.0), 1), ((0.0, math.nan, 9.0), 1), ((math.nan,) * 3, 0), ((0, 0, math.inf), 2)],
)
def test_a_token_that_lies_too_far_behind_is_told(margins: Sequence[float], position: int) -> None:
    with pytest.raises(
        WorkbenchError, match=rf"token {position} of request 'r0'.*{margins[position]:.3g} "
    ):
        score((7, 8, 9), margins)


@pytest.mark.parametrize(
    ("tokens", "ignore_eos"), [((), True), ((), False), ((7, 8), True), ((7, 8, 9, 9), True)]
)
def test_an_output_that_is_cut_short_is_told(tokens: Sequence[int], ignore_eos: bool) -> None:
    with pytest.raises(WorkbenchError, match=rf"'r0' brought {len(tokens)} of 3 output tokens"):
        score(tokens, (0.0,) * 4, ignore_eos)


def test_the_engine_s_own_reference_starts_followers_when_a_measured_row_does() -> None:
    """Both serve the same batches, or near-ties would fall differently."""
    served: list[list[str]] = []

    class Serving:
        def run(self, source: Any, on_event: Any) -> None:
            while not source.exhausted or not served:
                now = time.perf_counter()
                taken = [r.request_id for r in source.poll(now, 0)]
                assert taken, "nobody is due"
                served.append(taken)
                for name in taken:
                    on_event(TokenEvent(name, now, (5,), True))

        def close(self) -> None: ...

    variant = cast(Variant, SimpleNamespace(kind="engine", build=Serving))
    requests = [
        WorkloadRequest("first", (1, 2), 1),
        WorkloadRequest("alone", (1, 2), 1),
        WorkloadRequest("next", (1, 2), 1, after="first"),
    ]
    outputs = _engine_reference([variant])(requests)
    assert served == [["first", "alone"], ["next"]]
    assert outputs == {"first": (5,), "alone": (5,), "next": (5,)}
