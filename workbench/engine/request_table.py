"""State of running requests in fixed rows on the device.

A request owns one row from its first step to its last; a step gathers the rows it needs. What a
forward pass reads (token ids, progress, block tables) is here and not in per-step tensors, so a
steady decode step needs nothing from the host but which rows run (as vLLM's second model runner
and mini-sglang do it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest
from workbench.engine.upload import upload, upload_into


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
        row = self._free_rows.pop()
        self.row_of[new.request_id] = row
        count = len(new.token_ids)
        self._write_tokens(row, 0, np.asarray(new.token_ids, np.int32))
        self.num_computed_tokens[row].fill_(new.num_computed_tokens)
        self.num_computed_host[row] = new.num_computed_tokens
        self.seeds[row].fill_(new.seed)
        self.params[row] = new.sampling
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.num_tokens[row] = count
        self.num_blocks[row] = 0
        self._write_blocks([row], [new.block_ids])
        p = new.sampling
        if not p.is_greedy or p.has_penalties or p.logprobs is not None:
            self._elaborate.add(row)
        return row

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
        where: list[int] = []
        for row, blocks in zip(rows, block_ids, strict=True):
            column = self.num_blocks[row]
            for block in blocks:
                host[row, column] = block
                where.append(row * width + column)
                column += 1
            self.num_blocks[row] = column
        if where and not self._shares_memory:
            what = [block for blocks in block_ids for block in blocks]
            packed = upload([where, what], self.device)
            self.block_table.view(-1)[packed[0]] = packed[1].to(torch.int32)

    def write_drafts(self, row: int, drafts: list[int]) -> None:
        """Put drafts behind a row's last known token."""
        if drafts:
            self._write_tokens(row, self.num_tokens[row], np.asarray(drafts, np.int32))

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

    def known_tokens(self, row: int) -> np.ndarray:
        """Host view of a row's known tokens, int32 ``[n]``; not to be written.

        On a device of its own memory, only where there is a drafter to read them.
        """
        return self.host_token_ids[row, : self.num_tokens[row]]

    def _write_tokens(self, row: int, first: int, tokens: np.ndarray) -> None:
        if self._shares_memory or self._has_mirror:
            self.host_token_ids[row, first : first + len(tokens)] = tokens
        if not self._shares_memory:
            upload_into(self.token_ids[row, first : first + len(tokens)], tokens)
