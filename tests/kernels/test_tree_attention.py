"""Attention within token trees, by every implementation: a node sees what a sequence of its path
would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import kernels
from kernels.attention import Implementation
from kernels.tree_attention import NO_TREE, Tree, tree_rows
from tests.helpers.interpreted import DEVICE, needs_kernels, run_in_interpreter, starts_interpreter
from tests.helpers.tree_cases import SCALE, tree_case

#: No tree; nodes behind known tokens; nothing but nodes; some of the nodes only.
SMALL = ((0, 3), (9, 3), (6, 0), (7, -4))
#: More nodes than a word of bits has, and than one tile of keys.
LARGE = ((0, 2), (90, 3), (70, 0), (88, -4))
MASKS = pytest.mark.parametrize(
    ("window", "soft_cap"), [(None, None), (3, None), (40, 5.0)], ids=str
)


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@MASKS
@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("implementation", ["native", "sdpa", "reference"])
def test_on_the_cpu(
    implementation: Implementation,
    shapes: Sequence[tuple[int, int]],
    window: int | None,
    soft_cap: float | None,
) -> None:
    if implementation == "sdpa":
        soft_cap = None  # torch's fused attention has none
    for seed in range(3):
        case = tree_case(shapes, known=80, seed=seed)
        options = case.options(window, soft_cap)
        found = kernels.paged_attend(
            *case.arguments, SCALE, **options, implementation=implementation
        )
        case.check(found, window, soft_cap)


@needs_kernels
@MASKS
@pytest.mark.parametrize("kernel", ["decode", "decode, many nodes", "prefill"])
def test_by_triton(kernel: str, window: int | None, soft_cap: float | None) -> None:
    """The decode kernel with one word of bits and with two, and the prefill kernel."""
    shapes = {"decode": SMALL, "decode, many nodes": ((0, 1), (70, -66)), "prefill": LARGE}[kernel]
    case = tree_case(shapes, known=40, seed=1, device=DEVICE)
    found = kernels.paged_attend(
        *case.arguments,
        SCALE,
        **case.options(window, soft_cap),
        max_query_len=case.max_query_len,
        implementation="triton",
    )
    case.check(found, window, soft_cap)


def test_rows_say_who_sees_whom() -> None:
    tree = Tree(start=1, num_queries=4, first=20, parents=[-1, 0, 0])
    rows = tree_rows([tree], 6, None).tolist()
    no_tree = [NO_TREE, 0, 0]
    assert rows == [no_tree, [20, 0, 0], [20, 1, 1], [20, 2, 3], [20, 2, 5], no_tree]
    newest = Tree(start=0, num_queries=2, first=20, parents=[-1, 0, 0])
    assert tree_rows([newest], 2, None).tolist() == [[20, 2, 3], [20, 2, 5]]
    chain = Tree(0, 3, 7, [-1, 0, 1])
    assert tree_rows([chain], 3, 2).tolist() == [[7, 1, 1], [7, 2, 3], [7, 3, 6]]  # a window of 2
    long = Tree(0, 66, 7, list(range(-1, 65)))
    assert torch.from_numpy(tree_rows([long], 66, None))[-1].tolist() == [7, 66, -1, 3]
