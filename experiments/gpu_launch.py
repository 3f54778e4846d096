"""How long does the host take for a launch of each op, through Triton and without it?

    python -m experiments.gpu_launch [launches=200] [rounds=7]

Ops run at the shapes of Qwen3-0.6B, for a chunk of 8,192 tokens and for one token. A round launches
each many times without waiting for the device, few enough that the device's queue holds them, and
the median round counts. Three ways: with the launch worked out anew every time, with Triton's own
launch, and as it is repeated (:mod:`kernels.triton.launch`). Outputs of the last two must be equal
bit for bit, or the exit status is 1.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments import command
from workbench.core.errors import ConfigError

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 1024, 3072, 16, 8, 128, 28, 151936
BLOCK_SIZE, CHUNK, REQUEST, CONTEXT = 16, 8192, 2048, 512  # tokens
SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
#: Launches of a layer that are Triton's; products are cuBLAS's.
LAYER = ("add norm", "rope", "attention", "add norm", "silu")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    launches
        Calls of a round, which no one waits for: a device's queue holds about a thousand launches.
    rounds
        Rounds, of which the median counts.
    """

    launches: int = 200
    rounds: int = 7


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random values on the card."""
    return torch.randn(shape, device="cuda").to(dtype)


def index(values: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Positions, slots or lengths on the card."""
    return values.to("cuda", dtype)


class Inputs:
    """Tensors of a step; the same values each time."""

    def __init__(self, num_tokens: int) -> None:
        torch.manual_seed(0)
        num_requests = max(1, num_tokens // REQUEST)
        queries = num_tokens // num_requests
        length = queries if queries > 1 else CONTEXT
        pages = length // BLOCK_SIZE
        num_blocks = num_requests * pages
        self.x, self.residual = new(num_tokens, HIDDEN), new(num_tokens, HIDDEN)
        self.odd = new(num_tokens * HIDDEN + 1)[1:].view(num_tokens, HIDDEN)
        self.weight, self.head_weight = new(HIDDEN), new(HEAD_DIM)
        self.gate_up = new(num_tokens, 2 * INNER)
        self.qkv = new(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.kv = new(num_blocks, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.cos_sin = new(length, HEAD_DIM, dtype=torch.float32)
        tokens = torch.arange(length)[-queries:].repeat(num_requests)
        self.positions = index(tokens, torch.int64)
        table = torch.randperm(num_blocks).view(num_requests, pages)
        pages_of = table.repeat_interleave(queries, 0)
        blocks = pages_of.gather(1, (tokens // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        self.slots = index(blocks * BLOCK_SIZE + tokens % BLOCK_SIZE, torch.int64)
        self.table = index(table)
        self.starts = index(torch.arange(num_requests + 1) * queries)
        self.lengths = index(torch.full((num_requests,), length))
        self.max_query_len = queries
        self.logits = new(num_requests, VOCAB)
        self.settings = new(4, num_requests, dtype=torch.float32).abs().clamp(0.1, 0.9)
        self.seeds = index(torch.arange(num_requests), torch.int64)

    def tensors(self) -> list[Tensor]:
        """All of them, to compare what an op wrote."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]


def ops() -> dict[str, Callable[[Inputs], Any]]:
    """A call of each op's Triton implementation."""
    from kernels.attention import paged_attend
    from kernels.triton import activation, argmax, norm, rotary, sampling

    def rope(i: Inputs) -> None:
        caches = (i.kv[:, 0], i.kv[:, 1])
        norms = {"q_norm": i.head_weight, "k_norm": i.head_weight}
        rotary.apply_rope_and_write_kv(
            i.qkv, i.positions, i.cos_sin, i.slots, *caches, **SIZES, **norms
        )

    def attend(i: Inputs) -> Tensor:
        q = i.qkv[:, : HEADS * HEAD_DIM].unflatten(1, (HEADS, HEAD_DIM))
        pages = (i.kv[:, 0], i.kv[:, 1], i.table, i.starts, i.lengths)
        return paged_attend(
            q, *pages, HEAD_DIM**-0.5, max_query_len=i.max_query_len, implementation="triton"
        )

    return {
        "norm": lambda i: norm.rms_norm(i.x, i.weight, 1e-6),
        "norm, odd address": lambda i: norm.rms_norm(i.odd, i.weight, 1e-6),
        "add norm": lambda i: norm.add_rms_norm_(i.x, i.residual, i.weight, 1e-6),
        "silu": lambda i: activation.silu_and_mul(i.gate_up),
        "rope": rope,
        "attention": attend,
        "argmax": lambda i: argmax.argmax(i.logits),
        "sample": lambda i: sampling.sample(i.logits, i.settings, i.seeds, i.seeds),
    }


def planned_ops() -> list[Any]:
    """What keeps launches: one or more an op."""
    import importlib
    import pkgutil

    import kernels.triton
    from kernels.triton.launch import planned

    names = [m.name for m in pkgutil.iter_modules(kernels.triton.__path__, "kernels.triton.")]
    found = [vars(importlib.import_module(name)).values() for name in names]
    return [value for values in found for value in values if isinstance(value, planned)]


def host_us(call: Callable[[], object], options: Options) -> float:
    """Time of the host for a call, in us."""
    times = []
    for _ in range(options.rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(options.launches):
            call()
        times.append((time.perf_counter() - began) / options.launches * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def is_equal(op: Callable[[Inputs], Any], num_tokens: int) -> bool:
    """Whether Triton's launch and the repeated one write the same bits."""
    from kernels.triton import launch

    results = []
    for is_direct in (False, True):
        op(Inputs(num_tokens))  # from now on the layout is known
        inputs = Inputs(num_tokens)
        before = launch.through_triton.total()
        if is_direct:
            out = op(inputs)
            if launch.through_triton.total() != before:
                raise ConfigError(f"nothing is launched directly here: {launch.describe()}.")
        else:
            with launch.only_triton():
                out = op(inputs)
        results.append([*inputs.tensors(), *([] if out is None else [out])])
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(*results, strict=True)
    )


def main(arguments: Sequence[str]) -> int:
    """Compare, time, and print a row an op."""
    options, unknown = command.parse(Options, arguments)
    if unknown:
        raise ConfigError(f"unknown: {', '.join(unknown)}. Options: launches=, rounds=.")
    if not torch.cuda.is_available():
        raise ConfigError("this experiment needs a CUDA device.")
    from kernels.triton import launch

    plans = planned_ops()
    table = command.new_table(
        "host time of a call, us",
        "op", "tokens", "worked out anew", "through Triton", "repeated", "equal",
    )  # fmt: skip
    columns: dict[tuple[str, int], list[float]] = {}
    status = 0
    gc.disable()
    for num_tokens in (CHUNK, 1):
        inputs = Inputs(num_tokens)
        for name, op in ops().items():
            equal = is_equal(op, num_tokens)
            status |= not equal

            def anew(op: Callable[[Inputs], Any] = op, inputs: Inputs = inputs) -> None:
                for plan in plans:
                    plan.forget()
                op(inputs)

            def repeated(op: Callable[[Inputs], Any] = op, inputs: Inputs = inputs) -> None:
                op(inputs)

            times = [host_us(anew, options)]
            with launch.only_triton():
                times.append(host_us(repeated, options))
            times.append(host_us(repeated, options))
            columns[name, num_tokens] = times
            cells = [f"{t:.1f}" for t in times]
            table.add_row(name, str(num_tokens), *cells, "yes" if equal else "NO")
    gc.enable()
    layer = [sum(columns[name, CHUNK][way] for name in LAYER) for way in range(3)]
    chunk = " / ".join(f"{us * LAYERS / 1000:.2f}" for us in layer)
    command.show(
        table,
        f"{LAYERS} layers of a chunk, their {len(LAYER)} Triton launches each: {chunk} ms of the"
        f" host. {launch.describe()}",
    )
    return status


if __name__ == "__main__":
    command.run(main)
