"""Inputs and write-back of a step of single tokens, against the plain torch forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.decode_step import (
    gather_decode_inputs,
    gather_decode_inputs_reference,
    store_decoded,
    store_decoded_reference,
)
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

POISON = -7


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class Tables:
    """Tables of nine rows, of which the last is padding's."""

    def __init__(self, block_size: int, width: int = 700) -> None:
        generator = torch.Generator().manual_seed(block_size)
        columns = -(-width // block_size)
        self.block_size = block_size
        self.token_ids = torch.randint(0, 1000, (9, width + 3), generator=generator).int()
        blocks = torch.randperm(9 * columns, generator=generator).view(9, columns)
        self.block_table = blocks.int()
        self.computed = torch.randint(0, width, (9,), generator=generator)
        self.computed[1], self.computed[2] = 0, width - 1
        self.computed[8] = 0
        for name in ("token_ids", "block_table", "computed"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    def buffers(self, size: int) -> dict[str, Tensor]:
        long, short = (
            {"dtype": d, "device": DEVICE, "fill_value": POISON} for d in (torch.int64, torch.int32)
        )
        return {
            "input_ids": torch.full((size,), **long),
            "positions": torch.full((size,), **long),
            "seq_lens": torch.full((size,), **short),
            "slot_mapping": torch.full((size,), **long),
            "batch_block_table": torch.full((size, self.block_table.shape[1]), **short),
        }


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 7, 5], [2, 8, 8, 8], []])
def test_inputs_are_the_reference_s(block_size: int, rows: list[int]) -> None:
    tables = Tables(block_size)
    index = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    given = (index, tables.token_ids, tables.computed, tables.block_table, block_size)
    out, wanted = tables.buffers(len(rows)), tables.buffers(len(rows))
    gather_decode_inputs(*given, **out)
    gather_decode_inputs_reference(*given, **wanted)
    used = wanted["seq_lens"].long().add(block_size - 1) // block_size
    reached = torch.arange(tables.block_table.shape[1], device=DEVICE) < used.unsqueeze(1)
    wanted["batch_block_table"].masked_fill_(~reached, POISON)
    for name, tensor in out.items():
        assert torch.equal(tensor, wanted[name]), name


@needs_kernels
@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 7, 5], [4, 8, 8], []])
def test_what_is_left_behind_is_the_reference_s(rows: list[int]) -> None:
    ours, theirs = Tables(16), Tables(16)
    index = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    new = torch.arange(5000, 5000 + len(rows), device=DEVICE)
    before = ours.token_ids.clone(), ours.computed.clone()
    positions = ours.computed[index]
    store_decoded(index, positions, new, ours.token_ids, ours.computed)
    store_decoded_reference(index, positions, new, theirs.token_ids, theirs.computed)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.computed, theirs.computed)
    assert torch.equal(ours.token_ids[8], before[0][8]), "padding's row stays"
    changed = (ours.computed != before[1]).nonzero().flatten().tolist()
    assert changed == sorted(set(rows) - {8})
