"""Inputs and write-back of a step that verifies drafts, against the plain torch forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.verify_step import (
    gather_verify_inputs,
    gather_verify_inputs_reference,
    store_verified,
    store_verified_reference,
)
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

POISON = -7
TRASH = 4321
PADDING = 8
#: Rows with their drafts, for up to four drafts a row.
PLACES = {
    "one": [[3, 2]],
    "all kinds": [[0, 4], [1, 0], [2, 4], [7, 1], [5, 3]],
    "padded": [[4, 3], [PADDING, 0], [PADDING, 0]],
    "none": [],
}


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class Tables:
    """Tables of nine rows, of which the last is padding's; no row is shorter than a step."""

    def __init__(self, block_size: int, drafts: int = 4, width: int = 700) -> None:
        generator = torch.Generator().manual_seed(block_size)
        columns = -(-width // block_size)
        self.block_size = block_size
        self.token_ids = torch.randint(0, 5, (9, width + 9), generator=generator).int()
        self.block_table = torch.randperm(9 * columns, generator=generator).view(9, columns).int()
        self.block_table[PADDING] = TRASH
        self.computed = torch.randint(drafts, width - drafts, (9,), generator=generator)
        self.computed[1], self.computed[2] = drafts, width - drafts - 1
        self.computed[PADDING] = 0
        for name in ("token_ids", "block_table", "computed"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    def inputs(self, count: int, size: int) -> dict[str, Tensor]:
        long, short = (
            {"dtype": d, "device": DEVICE, "fill_value": POISON} for d in (torch.int64, torch.int32)
        )
        return {
            "input_ids": torch.full((count * size,), **long),
            "positions": torch.full((count * size,), **long),
            "seq_lens": torch.full((count,), **short),
            "slot_mapping": torch.full((count * size,), **long),
            "batch_block_table": torch.full((count, self.block_table.shape[1]), **short),
        }


def places_of(name: str) -> Tensor:
    return torch.tensor(PLACES[name], dtype=torch.int64, device=DEVICE).view(-1, 2)


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("size", [5, 8])
def test_inputs_are_the_reference_s(block_size: int, name: str, size: int) -> None:
    tables, places = Tables(block_size, size - 1), places_of(name)
    given = (places, tables.token_ids, tables.computed, tables.block_table)
    out, wanted = tables.inputs(len(places), size), tables.inputs(len(places), size)
    gather_verify_inputs(*given, block_size, **out)
    gather_verify_inputs_reference(*given, *wanted.values(), block_size)
    used = wanted["seq_lens"].long().add(block_size - 1) // block_size
    reached = torch.arange(tables.block_table.shape[1], device=DEVICE) < used.unsqueeze(1)
    wanted["batch_block_table"].masked_fill_(~reached, POISON)
    for key, tensor in out.items():
        assert torch.equal(tensor, wanted[key]), key


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16])
def test_only_known_last_tokens_and_drafts_reach_their_blocks(block_size: int) -> None:
    """Each place, written out token by token."""
    tables, size = Tables(block_size), 5
    places = torch.cat([places_of("all kinds"), places_of("padded")])
    out = tables.inputs(len(places), size)
    tensors = (places, tables.token_ids, tables.computed, tables.block_table)
    gather_verify_inputs(*tensors, block_size, **out)
    for place, (row, num_drafts) in enumerate(places.tolist()):
        computed = int(tables.computed[row])
        end = size if row == PADDING else computed + num_drafts + 1
        assert out["seq_lens"][place] == end
        for step in range(size):
            token, at = place * size + step, end - size + step
            assert out["positions"][token] == at
            assert out["input_ids"][token] == tables.token_ids[row, at]
            is_own = row != PADDING and at >= computed
            block = int(tables.block_table[row, at // block_size]) if is_own else TRASH
            assert out["slot_mapping"][token] == block * block_size + at % block_size


def accepted_by_hand(drawn: list[int], ids: list[int], num_drafts: int) -> list[int]:
    """New tokens of one place."""
    new, size = [], len(drawn)
    for step in range(size - 1 - num_drafts, size):
        new.append(drawn[step])
        if step + 1 < size and ids[step + 1] != drawn[step]:
            break
    return new


@needs_kernels
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("seed", range(4))
def test_what_holds_is_kept(name: str, seed: int) -> None:
    ours, theirs, size = Tables(16), Tables(16), 5
    places = places_of(name)
    count = len(places)
    before = ours.token_ids.clone(), ours.computed.clone()
    inputs = ours.inputs(count, size)
    gather_verify_inputs(places, ours.token_ids, ours.computed, ours.block_table, 16, **inputs)
    generator = torch.Generator().manual_seed(seed)
    # Mostly what follows, so that drafts hold to their end, in part and not at all.
    drawn = inputs["input_ids"].cpu().roll(-1)
    wrong = torch.rand(drawn.shape, generator=generator) < 0.25
    drawn = torch.where(wrong, 77, drawn).to(DEVICE)
    given = (places, inputs["seq_lens"], inputs["input_ids"], drawn)
    new = [torch.full((count, size), POISON, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    store_verified(*given, ours.token_ids, ours.computed, new[0])
    store_verified_reference(*given, theirs.token_ids, theirs.computed, new[1])
    assert torch.equal(new[0], new[1])
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.computed, theirs.computed)
    for place, (row, num_drafts) in enumerate(places.tolist()):
        span = slice(place * size, (place + 1) * size)
        wanted = accepted_by_hand(
            drawn[span].tolist(), inputs["input_ids"][span].tolist(), num_drafts
        )
        assert new[0][place].tolist() == wanted + [-1] * (size - len(wanted))
        if row != PADDING:
            start = int(before[1][row]) + 1
            assert ours.token_ids[row, start : start + len(wanted)].tolist() == wanted
            assert int(ours.computed[row]) == start + len(wanted) - 1
    for table, was in zip((ours.token_ids, ours.computed), before, strict=True):
        assert torch.equal(table[PADDING], was[PADDING]), "padding's row stays"
