"""A tiny random Llama, loads, and an oracle for the tests of the baselines."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.baselines import hf_model
from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest

VOCAB_SIZE = 256
CONTEXT = 128
CONFIGS = Path(__file__).parents[2] / "conf" / "baseline"
#: Prompt length and max_tokens of a mixed workload.
SHAPES = [(5, 7), (1, 3), (19, 12), (40, 1), (8, 9), (33, 5), (2, 16)]


class Source:
    """Hands out requests: at most ``concurrency`` in flight, none before its arrival."""

    def __init__(
        self, requests: list[WorkloadRequest], concurrency: int | None = None, is_open: bool = False
    ) -> None:
        self.pending = list(requests)
        self.concurrency = concurrency or len(requests)
        self.is_open = is_open
        self.start_s: float | None = None
        self.most_in_flight = 0

    def _due_s(self, request: WorkloadRequest) -> float:
        assert self.start_s is not None
        return self.start_s + (request.arrival_s if self.is_open else 0.0)

    def poll(self, now_s: float, num_in_flight: int) -> list[WorkloadRequest]:
        self.start_s = now_s if self.start_s is None else self.start_s
        out: list[WorkloadRequest] = []
        while (
            self.pending
            and num_in_flight + len(out) < self.concurrency
            and self._due_s(self.pending[0]) <= now_s
        ):
            out.append(self.pending.pop(0))
        self.most_in_flight = max(self.most_in_flight, num_in_flight + len(out))
        return out

    def next_due_s(self) -> float | None:
        return self._due_s(self.pending[0]) if self.is_open and self.pending else None

    @property
    def exhausted(self) -> bool:
        return not self.pending


def save_tiny_llama(folder: Path) -> Path:
    """Save two layers with random weights; no tokenizer, no generation config of note."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Wide weights keep logits apart, so that rounding decides nothing.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def one_thread() -> Iterator[None]:
    """Body of a fixture: one torch thread, and no model left open that was not open before."""
    before, loaded = torch.get_num_threads(), set(hf_model._loaded)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert set(hf_model._loaded) <= loaded, "a test left a model open"


def make_requests(shapes: list[tuple[int, int]], **fields: Any) -> list[WorkloadRequest]:
    """One request for each (prompt length, max_tokens), with prompts of their own."""
    generator = torch.Generator().manual_seed(1)
    return [
        WorkloadRequest(
            f"r{index}",
            tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()),
            max_tokens,
            **fields,
        )
        for index, (length, max_tokens) in enumerate(shapes)
    ]


@functools.cache
def plain_model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def oracle(folder: Path, requests: list[WorkloadRequest]) -> dict[str, list[int]]:
    """Greedy tokens by a whole forward for each of them: no cache, no generate."""
    model = plain_model(folder)
    tokens = {}
    for request in requests:
        ids = list(request.prompt_token_ids)
        with torch.no_grad():
            for _ in range(request.max_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        tokens[request.request_id] = ids[len(request.prompt_token_ids) :]
    return tokens


def run(
    backend: Any, requests: list[WorkloadRequest], **source: Any
) -> tuple[dict[str, list[int]], list[TokenEvent]]:
    events: list[TokenEvent] = []
    backend.run(Source(requests, **source), events.append)
    tokens: dict[str, list[int]] = {}
    for event in events:
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens, events


def check_events(requests: list[WorkloadRequest], events: list[TokenEvent]) -> None:
    """A token an event, times that never go back, and one end for each request, at its last."""
    for request in requests:
        mine = [event for event in events if event.request_id == request.request_id]
        assert [len(event.token_ids) for event in mine] == [1] * request.max_tokens
        assert [event.finished for event in mine] == [False] * (request.max_tokens - 1) + [True]
        assert all(event.error is None for event in mine)
        times = [event.time_s for event in mine]
        assert times == sorted(times)
        assert len(set(times)) == len(times)
