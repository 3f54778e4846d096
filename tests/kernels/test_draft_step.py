"""Inputs of a step in which a model drafts, and the way to the next token, against the plain torch
forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.draft_step import (
    advance_drafts,
    advance_drafts_reference,
    gather_draft_inputs,
    gather_draft_inputs_reference,
)
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

POISON = -7
PADDING, WIDTH, TRASH = 8, 700, 99
PLACES = {
    "one": [3],
    "all kinds": [0, 1, 2, 7, 5],
    "padded": [4, PADDING, PADDING],
    "none": [],
}
NUM_DRAFTS = 4


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class Tables:
    """Tables of nine rows, of which the last is padding's."""

    def __init__(self, block_size: int) -> None:
        generator = torch.Generator().manual_seed(block_size)
        columns = -(-(WIDTH + NUM_DRAFTS) // block_size)
        self.block_size = block_size
        token_ids = torch.randint(0, 1000, (9, WIDTH + 9), generator=generator).int()
        blocks = torch.randperm(9 * columns, generator=generator).view(9, columns).int()
        computed = torch.randint(8, WIDTH, (9,), generator=generator)
        computed[1], computed[2], computed[PADDING] = 3, WIDTH - 1, 0
        self.token_ids = token_ids.to(DEVICE)
        self.block_table = blocks.to(DEVICE)
        self.computed = computed.to(DEVICE)

    def places(self, rows: list[int]) -> Tensor:
        """Some have room for all drafts, some for none, some for a few."""
        rooms = [int(self.computed[row]) + 1 + (i % 3) * 2 for i, row in enumerate(rows)]
        return torch.tensor([rows, rooms], dtype=torch.int64, device=DEVICE).T.contiguous()

    def buffers(self, size: int, each: int) -> dict[str, Tensor]:
        long, short = (
            {"dtype": d, "device": DEVICE, "fill_value": POISON} for d in (torch.int64, torch.int32)
        )
        return {
            "input_ids": torch.full((size * each,), **long),
            "positions": torch.full((size * each,), **long),
            "seq_lens": torch.full((size,), **short),
            "slot_mapping": torch.full((size * each,), **long),
            "batch_block_table": torch.full((size, self.block_table.shape[1]), **short),
        }


def fill_by_reference(
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    out: dict[str, Tensor],
    block_size: int,
    ids_ahead: int,
) -> None:
    names = ("input_ids", "positions", "seq_lens", "slot_mapping", "batch_block_table")
    a, b, c, d, e = (out[name] for name in names)
    gather_draft_inputs_reference(*given, a, b, c, d, e, block_size, ids_ahead)


@needs_kernels
@pytest.mark.parametrize("ids_ahead", [0, 1])
@pytest.mark.parametrize("each", [1, 3, 4])
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("kind", PLACES)
def test_inputs_are_the_reference_s(kind: str, block_size: int, each: int, ids_ahead: int) -> None:
    tables, rows = Tables(block_size), PLACES[kind]
    places = tables.places(rows)
    given = (places, tables.token_ids, tables.computed, tables.block_table)
    out, wanted = (tables.buffers(len(rows), each) for _ in range(2))
    gather_draft_inputs(*given, block_size, ids_ahead, NUM_DRAFTS, **out)
    fill_by_reference(given, wanted, block_size, ids_ahead)
    reach = wanted["seq_lens"].long() - 1 + NUM_DRAFTS
    reached = torch.arange(tables.block_table.shape[1], device=DEVICE) <= (
        reach.unsqueeze(1) // block_size
    )
    wanted["batch_block_table"].masked_fill_(~reached, POISON)
    for name, tensor in out.items():
        assert torch.equal(tensor, wanted[name]), name


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_moved_on_is_the_reference_s(kind: str, block_size: int) -> None:
    found = []
    for is_ours in (True, False):
        tables, rows = Tables(block_size), PLACES[kind]
        places = tables.places(rows)
        given = (places, tables.token_ids, tables.computed, tables.block_table)
        buffers = tables.buffers(len(rows), 1)
        fill_by_reference(given, buffers, block_size, 0)
        table = buffers.pop("batch_block_table")
        drafts = torch.full((len(rows) + 1, NUM_DRAFTS), POISON, device=DEVICE)
        buffers["drafts"] = drafts[: len(rows)]
        for index in range(NUM_DRAFTS):
            drawn = torch.arange(len(rows), device=DEVICE) + 100 * index
            if rows.count(PADDING) > 1:  # whose places write to one row
                drawn[rows.index(PADDING) :] = 7
            books = (tables.token_ids, tables.computed)
            if is_ours:
                buffers |= dict(zip(("token_ids", "num_computed_tokens"), books, strict=True))
                advance_drafts(drawn, places, table, block_size, TRASH, **buffers, index=index)
                continue
            advance_drafts_reference(
                drawn,
                places,
                table,
                *books,
                buffers["input_ids"],
                buffers["positions"],
                buffers["seq_lens"],
                buffers["slot_mapping"],
                buffers["drafts"],
                block_size,
                TRASH,
                index,
            )
        assert (drafts[-1] == POISON).all()
        found.append({**buffers, "token_ids": tables.token_ids})
    for name, tensor in found[1].items():
        assert torch.equal(tensor, found[0][name]), name
    for i, row in enumerate(rows):  # drafts stand behind the last known token
        first = int(tables.computed[row]) + 1
        behind = found[0]["token_ids"][row, first : first + NUM_DRAFTS]
        assert behind.tolist() == found[0]["drafts"][i].tolist()[: len(behind)]
    if kind == "all kinds":  # the first has room for its last token alone
        assert found[0]["slot_mapping"][0] == TRASH * block_size
        assert found[0]["positions"][0] == tables.computed[rows[0]]
