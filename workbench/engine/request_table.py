"""State of running requests in fixed rows on the device.

A request owns one row from its first step to its last; a step gathers the rows it needs. What a
forward pass reads (token ids, progress, block tables) is here and not in per-step tensors, so a
steady decode step needs nothing from the host but which rows run (as vLLM's second model runner
and mini-sglang do it).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest
from workbench.engine.upload import upload


class RequestTable:
    """Rows ``0 .. max_num_seqs - 1``, and one more for padding, ``padding_row``.

    Parameters
    ----------
    max_num_seqs
        Requests at once.
    max_model_len
        Tokens a request.
    num_lookahead_tokens
        Drafts that may stand behind a request's last token.
    num_block_columns
        Blocks a request.

    Attributes
    ----------
    token_ids : Tensor[R + 1, max_model_len + lookahead + 1] int32
        Known tokens and, behind them, drafts. The last column takes what is not to be kept.
    num_computed_tokens : Tensor[R + 1] int64
    block_table : Tensor[R + 1, P] int32
    seeds : Tensor[R + 1] int64
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_lookahead_tokens: int,
        num_block_columns: int,
        device: torch.device,
    ) -> None:
        rows, width = max_num_seqs + 1, max_model_len + num_lookahead_tokens + 1
        self.device = device
        self.trash_column = width - 1
        self.padding_row = rows - 1
        self.token_ids = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.num_computed_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(rows, num_block_columns, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        # What the host needs of a row. On the CPU the token ids are the same memory; elsewhere they
        # are kept for a drafter only.
        self._shares_memory = device.type == "cpu"
        self._has_mirror = not self._shares_memory and num_lookahead_tokens > 0
        self.host_token_ids: np.ndarray = (
            self.token_ids.numpy()
            if self._shares_memory
            else np.zeros((rows if self._has_mirror else 0, width), np.int32)
        )
        self.host_block_table: np.ndarray = (
            self.block_table.numpy()
            if self._shares_memory
            else np.zeros((rows, num_block_columns), np.int32)
        )
        self.params: list[SamplingParams | None] = [None] * rows
        self.num_prompt_tokens = [0] * rows
        self.num_tokens = np.zeros(rows, np.int64)
        self.num_computed_host = np.zeros(rows, np.int64)
        self.num_blocks = [0] * rows
        #: Requests that had a row so far.
        self.num_owners = np.zeros(rows, np.int64)
        self.row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._elaborate: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes held on the device."""
        held = (self.token_ids, self.num_computed_tokens, self.block_table, self.seeds)
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def all_plain_greedy(self) -> bool:
        """Whether no row draws at random, has penalties or wants log-probabilities."""
        return not self._elaborate

    def add(self, new: NewRequest) -> int:
        """Give a request a row and fill it; returns the row."""
        return self.add_all([new])[0]

    def add_all(self, new_requests: Sequence[NewRequest]) -> list[int]:
        """Give requests rows and fill them, in a few writes to the device; returns the rows."""
        rows = [self._free_rows.pop() for _ in new_requests]
        tokens = [np.fromiter(n.token_ids, np.int32, len(n.token_ids)) for n in new_requests]
        for row, new, ids in zip(rows, new_requests, tokens, strict=True):
            self.row_of[new.request_id] = row
            self.num_computed_host[row] = new.num_computed_tokens
            self.params[row] = new.sampling
            self.num_prompt_tokens[row] = new.num_prompt_tokens
            self.num_tokens[row] = len(ids)
            self.num_blocks[row] = 0
            self.num_owners[row] += 1
            if len(self.host_token_ids):
                self.host_token_ids[row, : len(ids)] = ids
            p = new.sampling
            if not p.is_greedy or p.has_penalties or p.logprobs is not None:
                self._elaborate.add(row)
        if not self._shares_memory:
            starts = np.array(rows, np.int64) * self.token_ids.shape[1]
            places = _consecutive(starts, np.array([len(ids) for ids in tokens]))
            values = upload(np.concatenate(tokens), self.device, torch.int32)
            self.token_ids.view(-1)[upload(places, self.device)] = values
        computed = [new.num_computed_tokens for new in new_requests]
        packed = upload([rows, computed, [new.seed for new in new_requests]], self.device)
        self.num_computed_tokens[packed[0]] = packed[1]
        self.seeds[packed[0]] = packed[2]
        self._write_blocks(rows, [new.block_ids for new in new_requests])
        return rows

    def remove(self, request_id: str) -> None:
        """Free a request's row."""
        row = self.row_of.pop(request_id, None)
        if row is None:
            return
        self.params[row] = None
        self._elaborate.discard(row)
        self._free_rows.append(row)

    def append_blocks(self, new_block_ids: Mapping[str, Sequence[int]]) -> None:
        """Extend the block tables of requests, all in one write to the device."""
        self._write_blocks([self.row_of[r] for r in new_block_ids], list(new_block_ids.values()))

    def _write_blocks(self, rows: list[int], block_ids: Sequence[Sequence[int]]) -> None:
        host, width = self.host_block_table, self.block_table.shape[1]
        starts: list[int] = []
        for row, blocks in zip(rows, block_ids, strict=True):
            column = self.num_blocks[row]
            host[row, column : column + len(blocks)] = blocks
            starts.append(row * width + column)
            self.num_blocks[row] = column + len(blocks)
        counts = np.array([len(blocks) for blocks in block_ids], np.int64)
        total = int(counts.sum())
        if total and not self._shares_memory:
            packed = np.empty((2, total), np.int64)
            packed[0] = _consecutive(np.array(starts, np.int64), counts)
            packed[1] = np.fromiter(itertools.chain.from_iterable(block_ids), np.int64, total)
            places, blocks_there = upload(packed, self.device)
            self.block_table.view(-1)[places] = blocks_there.to(torch.int32)

    def write_drafts(self, rows: np.ndarray, drafts: Sequence[Sequence[int]]) -> None:
        """Put drafts behind the last known token of each row, all in one write to the device."""
        counts = np.array([len(draft) for draft in drafts], np.int64)
        total = int(counts.sum())
        if not total:
            return
        starts = rows * self.token_ids.shape[1] + self.num_tokens[rows]
        packed = np.empty((2, total), np.int64)
        packed[0] = _consecutive(starts, counts)
        packed[1] = np.fromiter(itertools.chain.from_iterable(drafts), np.int64, total)
        self.host_token_ids.reshape(-1)[packed[0]] = packed[1]
        if not self._shares_memory:
            places, tokens = upload(packed, self.device)
            self.token_ids.view(-1)[places] = tokens.to(torch.int32)

    def note_tokens(self, rows: np.ndarray, token_ids: list[list[int]]) -> None:
        """Bring the host's books up with new tokens that the device wrote itself."""
        if self._has_mirror:
            for row, new in zip(rows, token_ids, strict=True):
                first = self.num_tokens[row]
                self.host_token_ids[row, first : first + len(new)] = new
        self.num_tokens[rows] += np.array([len(new) for new in token_ids], np.int64)
        self.num_computed_host[rows] = self.num_tokens[rows] - 1

    def count_tokens(self, rows: np.ndarray) -> None:
        """Count one new token of each row, which nobody on the host has to know."""
        self.num_tokens[rows] += 1
        self.num_computed_host[rows] = self.num_tokens[rows] - 1

    def fill_tokens(
        self, rows: np.ndarray, owners: np.ndarray, places: np.ndarray, token_ids: list[list[int]]
    ) -> None:
        """Note tokens that were counted before they were known, one a row.

        Parameters
        ----------
        owners
            ``num_owners`` of the rows when the tokens were counted: a row that another request has
            by now is left alone.
        places
            Where in a row its token belongs.
        """
        if self._has_mirror:
            new = np.fromiter((ids[0] for ids in token_ids), np.int32, len(token_ids))
            is_there = self.num_owners[rows] == owners
            self.host_token_ids[rows[is_there], places[is_there]] = new[is_there]

    def known_tokens(self, row: int) -> np.ndarray:
        """Host view of a row's known tokens, int32 ``[n]``; not to be written.

        On a device of its own memory, only where there is a drafter to read them.
        """
        return self.host_token_ids[row, : self.num_tokens[row]]


def _consecutive(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``starts[i], starts[i] + 1, …``, ``counts[i]`` numbers of each, one after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
