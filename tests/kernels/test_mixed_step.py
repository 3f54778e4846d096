"""Inputs of a step of any numbers of tokens, against the plain torch form and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.mixed_step import gather_mixed_inputs, gather_mixed_inputs_reference
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

POISON = -7
TRASH = 4321
PADDING = 8
WIDTH = 700
SIZE = 320
#: Rows with the tokens that they run.
SPLITS = {
    "one token": [(3, 1)],
    "a prompt": [(2, 130)],
    "full": [(0, 1), (1, 200), (7, 119)],
    "mixed": [(4, 1), (0, 17), (5, 1), (1, 128), (6, 129)],
    "none": [],
}


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class Tables:
    """Tables of nine rows, of which the last is padding's, and the places of a split."""

    def __init__(self, block_size: int, split: list[tuple[int, int]], num_requests: int) -> None:
        generator = torch.Generator().manual_seed(block_size)
        columns = -(-WIDTH // block_size)
        token_ids = torch.randint(0, 5, (9, WIDTH), generator=generator).int()
        block_table = torch.randperm(9 * columns, generator=generator).view(9, columns).int()
        block_table[PADDING] = TRASH
        computed = torch.randint(0, WIDTH - 200, (9,), generator=generator)
        computed[1], computed[2], computed[PADDING] = 0, WIDTH - 130, 0
        places = torch.full((num_requests + 1, 4), POISON)
        places[:, 0] = PADDING
        places[:, 1] = sum(length for _, length in split)
        start = 0
        for index, (row, length) in enumerate(split):
            places[index, 0], places[index, 1] = row, start
            start += length
        self.given = tuple(t.to(DEVICE) for t in (places, token_ids, computed, block_table))

    def inputs(self) -> dict[str, Tensor]:
        num_requests, columns = len(self.given[0]) - 1, self.given[3].shape[1]
        shapes = {
            "input_ids": (torch.int64, SIZE),
            "positions": (torch.int64, SIZE),
            "query_start_loc": (torch.int32, num_requests + 1),
            "seq_lens": (torch.int32, num_requests),
            "slot_mapping": (torch.int64, SIZE),
        }
        out = {
            name: torch.full((count,), POISON, dtype=dtype, device=DEVICE)
            for name, (dtype, count) in shapes.items()
        }
        table = torch.full((num_requests, columns), POISON, dtype=torch.int32, device=DEVICE)
        return {**out, "batch_block_table": table}


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("num_requests", [5, 8])
def test_inputs_are_the_reference_s(block_size: int, name: str, num_requests: int) -> None:
    tables = Tables(block_size, SPLITS[name], num_requests)
    out, wanted = tables.inputs(), tables.inputs()
    gather_mixed_inputs(*tables.given, block_size, **out)
    gather_mixed_inputs_reference(*tables.given, *wanted.values(), block_size)
    used = wanted["seq_lens"].long().add(block_size - 1) // block_size
    columns = torch.arange(wanted["batch_block_table"].shape[1], device=DEVICE)
    wanted["batch_block_table"].masked_fill_(columns >= used.unsqueeze(1), POISON)
    for key, tensor in out.items():
        assert torch.equal(tensor, wanted[key]), key


@needs_kernels
@pytest.mark.parametrize("name", SPLITS)
def test_every_token_is_its_request_s_or_padding(name: str) -> None:
    """Each token, written out."""
    split, block_size = SPLITS[name], 16
    tables = Tables(block_size, split, 8)
    _, token_ids, computed, block_table = tables.given
    out = tables.inputs()
    gather_mixed_inputs(*tables.given, block_size, **out)
    wanted = []
    for index, (row, length) in enumerate(split):
        assert out["query_start_loc"][index] == len(wanted)
        assert out["seq_lens"][index] == int(computed[row]) + length
        for at in range(int(computed[row]), int(computed[row]) + length):
            slot = int(block_table[row, at // block_size]) * block_size + at % block_size
            wanted.append((int(token_ids[row, at]), at, slot))
    assert out["query_start_loc"][len(split) :].tolist() == [len(wanted)] * (9 - len(split))
    assert out["seq_lens"][len(split) :].tolist() == [0] * (8 - len(split))
    padding = (int(token_ids[PADDING, 0]), 0, TRASH * block_size)
    wanted += [padding] * (SIZE - len(wanted))
    names = ("input_ids", "positions", "slot_mapping")
    assert list(zip(*(out[key].tolist() for key in names), strict=True)) == wanted
