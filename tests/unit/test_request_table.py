"""The request table: rows are filled whole, freed once, and tell the host what the device knows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest
from workbench.engine.request_table import RequestTable


def make_table(rows: int = 3, length: int = 20, lookahead: int = 4) -> RequestTable:
    return RequestTable(
        max_num_seqs=rows,
        max_model_len=length,
        num_lookahead_tokens=lookahead,
        num_block_columns=5,
        device=torch.device("cpu"),
    )


def new_request(name: str, ids: list[int], **fields: Any) -> NewRequest:
    values: dict[str, Any] = {
        "num_prompt_tokens": len(ids),
        "num_computed_tokens": 0,
        "block_ids": [4],
        "sampling": SamplingParams(),
        "seed": 7,
        **fields,
    }
    return NewRequest(name, ids, **values)


def test_a_row_is_filled_whole() -> None:
    table = make_table()
    row = table.add(
        new_request("r", [5, 6, 7], num_prompt_tokens=2, num_computed_tokens=1, block_ids=[3, 1])
    )
    assert table.row_of == {"r": row}
    assert table.token_ids[row, :3].tolist() == [5, 6, 7]
    assert table.known_tokens(row).tolist() == [5, 6, 7]
    assert int(table.num_computed_tokens[row]) == 1
    assert table.block_table[row, :2].tolist() == [3, 1]
    assert int(table.seeds[row]) == 7
    assert table.num_prompt_tokens[row] == 2
    table.append_blocks({"r": []})
    table.append_blocks({"r": [0]})
    assert table.block_table[row, :3].tolist() == [3, 1, 0]


def test_rows_are_unique_and_come_back() -> None:
    table = make_table()
    rng = random.Random(0)
    live: dict[str, list[int]] = {}
    for step in range(200):
        if len(live) < 3 and rng.random() < 0.6:
            ids = [rng.randrange(100) for _ in range(rng.randint(1, 20))]
            table.add(new_request(f"r{step}", ids))
            live[f"r{step}"] = ids
        elif live:
            name = rng.choice(list(live))
            table.remove(name)
            del live[name]
        table.remove("unknown")
        assert table.row_of.keys() == live.keys()
        assert len(set(table.row_of.values())) == len(live)
        for name, ids in live.items():
            assert table.known_tokens(table.row_of[name]).tolist() == ids
    assert all(row < 3 for row in table.row_of.values()), "the padding row was handed out"


def test_a_reused_row_forgets_the_one_before() -> None:
    table = make_table(rows=1)
    hot = SamplingParams(temperature=1.0, logprobs=1)
    row = table.add(new_request("a", list(range(15)), block_ids=[1, 2, 3], sampling=hot))
    assert not table.all_plain_greedy
    table.remove("a")
    assert table.all_plain_greedy
    assert table.add(new_request("b", [9], block_ids=[4])) == row
    assert table.known_tokens(row).tolist() == [9]
    assert int(table.num_computed_tokens[row]) == 0
    table.append_blocks({"b": [0]})
    assert table.block_table[row, :2].tolist() == [4, 0]


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5}, {"repetition_penalty": 1.1}, {"logprobs": 0}]
)
def test_any_elaborate_row_is_noticed(fields: dict[str, Any]) -> None:
    table = make_table()
    table.add(new_request("plain", [1]))
    assert table.all_plain_greedy
    table.add(new_request("elaborate", [1], sampling=SamplingParams(**fields)))
    assert not table.all_plain_greedy
    table.remove("elaborate")
    assert table.all_plain_greedy


def test_drafts_stand_behind_the_known_tokens_and_fit_at_the_very_end() -> None:
    table = make_table(length=20, lookahead=4)
    row = table.add(new_request("r", list(range(20))))
    other = table.add(new_request("other", [1, 2]))
    table.write_drafts(np.array([row, other]), [[91, 92, 93, 94], [81]])
    table.write_drafts(np.array([row]), [[]])
    assert table.token_ids[other, :4].tolist() == [1, 2, 81, 0]
    assert table.token_ids[row, 20:24].tolist() == [91, 92, 93, 94]
    assert table.known_tokens(row).tolist() == list(range(20))
    assert table.trash_column == 24


def test_noted_tokens_become_known() -> None:
    table = make_table()
    rows = np.array([table.add(new_request(n, [1, 2])) for n in ("a", "b")])
    table.token_ids[rows[0], 2] = 50
    table.token_ids[rows[1], 2:4] = torch.tensor([60, 61], dtype=torch.int32)
    table.note_tokens(rows, [[50], [60, 61]])
    assert table.known_tokens(rows[0]).tolist() == [1, 2, 50]
    assert table.known_tokens(rows[1]).tolist() == [1, 2, 60, 61]
    assert table.num_computed_host[rows].tolist() == [2, 3]
    table.token_ids[rows[0], 3] = 51
    table.token_ids[rows[1], 4] = 62
    table.note_tokens(rows, [[51], [62]])
    assert table.known_tokens(rows[0]).tolist() == [1, 2, 50, 51]
    assert table.known_tokens(rows[1]).tolist() == [1, 2, 60, 61, 62]


def test_bytes_are_those_of_its_tensors() -> None:
    table = make_table(rows=3, length=20, lookahead=4)
    tokens, computed, blocks, seeds = 4 * 25 * 4, 4 * 8, 4 * 5 * 4, 4 * 8
    assert table.num_bytes >= tokens + computed + blocks + seeds
    assert make_table(rows=6).num_bytes > table.num_bytes


def test_what_a_device_of_its_own_memory_gets_is_what_the_request_brought() -> None:
    table = make_table()
    # As where nothing is shared: what is uploaded is all that the device's tensors get.
    table._shares_memory = False
    table.host_token_ids = np.zeros((0, table.token_ids.shape[1]), np.int32)
    table.host_block_table = np.zeros(tuple(table.block_table.shape), np.int32)
    rng = random.Random(0)
    for turn in range(20):
        new = [
            new_request(
                f"{turn}-{i}",
                [rng.randrange(99) for _ in range(rng.randint(1, 12))],
                block_ids=[rng.randrange(20) for _ in range(rng.randint(0, 2))],
            )
            for i in range(rng.randint(1, 2))
        ]
        rows = table.add_all(new)
        table.append_blocks({n.request_id: [7] for n in new})
        for row, n in zip(rows, new, strict=True):
            assert table.token_ids[row, : len(n.token_ids)].tolist() == n.token_ids
            blocks = [*n.block_ids, 7]
            assert table.block_table[row, : len(blocks)].tolist() == blocks
            assert table.host_block_table[row, : len(blocks)].tolist() == blocks
            assert table.seeds[row] == n.seed
            assert table.num_computed_tokens[row] == n.num_computed_tokens
            table.remove(n.request_id)
