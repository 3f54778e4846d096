"""Check, then time, the kernels of ``fused_kernels``: ``python -m experiments.gpu_fused``.

Norm, norm with addition, gated activation, argmax and sampling, beside torch's operations and, of
the first three, beside what torch.compile makes of them. A case is compared with the reference in
fp32 (argmax with the first of the greatest, draws with those of the same uniform numbers in double
precision) and timed only when it is right; timing as in ``experiments.gpu_attention``: a CUDA graph
over copies of the inputs. Bytes are those that have to be read and written, each once; of small
cases they lie in the L2 cache, as a step finds them. Samplers are timed outside a graph as well
(``whole``), with their host side: torch's cannot be captured.

Options: ``--only TEXT,TEXT`` (cases whose name contains one of these), ``--out FILE`` (records are
appended, as JSONL), ``--replays N``. The exit code is 1 where a case was wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_attention import (
    DEVICE,
    L2_BYTES,
    Work,
    format_row,
    machine,
    relative_error,
    run_case,
)
from kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from kernels.norm import add_rms_norm_reference_, rms_norm_reference
from kernels.sampling import argmax_reference
from kernels.triton import activation, argmax, norm, sampling
from techniques.fused_kernels import FusedSampler
from techniques.fused_kernels.sampler import pack
from techniques.torch_compile import CompiledOps, CompiledOpsConfig
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import (
    Sampler,
    SamplingMetadata,
    TorchSampler,
    invert_cdf,
    uniform_from_seed,
)

EPS = 1e-6
#: Two or three roundings to bf16, of half a step at most each.
BOUND = 4e-3
ROWS = (1, 32, 256, 8192)
VOCABS = (128256, 151936)

Op = Callable[..., Tensor]


def copies_of(num_bytes: int) -> int:
    return max(2, min(8, -(-4 * L2_BYTES // num_bytes)))


def values(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).to(torch.bfloat16)


def facts(ours: Tensor, reference: Tensor, **shape: Any) -> dict[str, Any]:
    """Shapes, and the share of values that are not the reference's in the same precision."""
    differing = (ours != reference).double().mean().item()
    return {**shape, "dtype": "bfloat16", "differing": round(differing, 6)}


def norm_work(op: Op, num_rows: int, hidden: int, heads: int = 0) -> Work:
    shape = (num_rows, heads, hidden) if heads else (num_rows, hidden)
    num_bytes = 2 * 2 * num_rows * max(1, heads) * hidden
    inputs = [values(*shape) for _ in range(copies_of(num_bytes))]
    weight = values(hidden)
    first = inputs[0]
    truth = rms_norm_reference(first.float(), weight.float(), EPS)
    return Work(
        calls=[partial(op, x, weight, EPS) for x in inputs],
        error=lambda: relative_error(op(first, weight, EPS), truth),
        bound=BOUND,
        num_bytes=num_bytes,
        facts=facts(
            op(first, weight, EPS),
            rms_norm_reference(first, weight, EPS),
            rows=num_rows,
            hidden=hidden,
            heads=heads,
        ),
    )


def add_work(op: Op, num_rows: int, hidden: int) -> Work:
    num_bytes = 4 * 2 * num_rows * hidden
    inputs = [
        (values(num_rows, hidden), values(num_rows, hidden)) for _ in range(copies_of(num_bytes))
    ]
    weight = values(hidden)
    x, residual = inputs[0]
    total = residual.float() + x.float()
    truth = rms_norm_reference(total, weight.float(), EPS)

    def error() -> float:
        added = residual.clone()
        out = op(x, added, weight, EPS)
        return max(relative_error(out, truth), relative_error(added, total))

    return Work(
        calls=[partial(op, x, residual, weight, EPS) for x, residual in inputs],
        error=error,
        bound=BOUND,
        num_bytes=num_bytes,
        facts=facts(
            op(x, residual.clone(), weight, EPS),
            add_rms_norm_reference_(x, residual.clone(), weight, EPS),
            rows=num_rows,
            hidden=hidden,
        ),
    )


def gated_work(op: Op, reference: Op, num_rows: int, inner: int) -> Work:
    num_bytes = 3 * 2 * num_rows * inner
    inputs = [values(num_rows, 2 * inner, scale=2.0) for _ in range(copies_of(num_bytes))]
    first = inputs[0]
    return Work(
        calls=[partial(op, x) for x in inputs],
        error=lambda: relative_error(op(first), reference(first.float())),
        bound=BOUND,
        num_bytes=num_bytes,
        facts=facts(op(first), reference(first), rows=num_rows, inner=inner),
    )


def argmax_work(op: Op, num_rows: int, vocab: int) -> Work:
    num_bytes = 2 * num_rows * vocab
    inputs = [values(num_rows, vocab, scale=3.0) for _ in range(copies_of(num_bytes))]

    def error() -> float:
        """Share of rows whose token is not the first of the greatest."""
        greatest = inputs[0] == inputs[0].amax(-1, keepdim=True)
        index = torch.arange(vocab, device=DEVICE).expand_as(greatest)
        expected = index.masked_fill(~greatest, vocab).amin(-1)
        return float((op(inputs[0]) != expected).double().mean())

    return Work(
        calls=[partial(op, x) for x in inputs],
        error=error,
        bound=0.0,
        num_bytes=num_bytes,
        facts={"rows": num_rows, "vocab": vocab, "dtype": "bfloat16"},
    )


#: What requests ask for.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "k 50, p 0.9, min-p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def exact_draws(logits: Tensor, params: SamplingParams, metadata: SamplingMetadata) -> Tensor:
    """Draws from the distribution that ``params`` ask of every row, in double precision."""
    scaled = logits.double() / params.temperature
    if params.top_k:
        least = scaled.topk(params.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if params.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= params.top_p
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
    probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
    return invert_cdf(probs, uniform_from_seed(metadata.seeds, metadata.positions))


def sampling_work(sampler: Sampler | None, num_rows: int, vocab: int, **setting: Any) -> Work:
    """A sampler as the engine calls it; or, without one, the kernel alone."""
    num_bytes = 2 * num_rows * vocab
    inputs = [values(num_rows, vocab, scale=3.0) for _ in range(copies_of(num_bytes))]
    params = [SamplingParams(temperature=0.8, seed=i, **setting) for i in range(num_rows)]
    index = torch.arange(num_rows, device=DEVICE)
    metadata = SamplingMetadata(params, index * 7, index, all_greedy=False)
    packed = pack(params, torch.device(DEVICE))

    def draw(logits: Tensor) -> Tensor:
        if sampler is not None:
            return sampler.sample(logits, metadata).token_ids
        return sampling.sample(logits, packed, metadata.seeds, metadata.positions)

    def error() -> float:
        """Share of rows with another token than in double precision."""
        expected = exact_draws(inputs[0], params[0], metadata)
        return float((draw(inputs[0].clone()) != expected).double().mean())

    return Work(
        calls=[partial(draw, x) for x in inputs],
        error=error,
        # Numbers that fall within rounding of a boundary; torch adds up in single precision.
        bound=1.0 if isinstance(sampler, TorchSampler) else 0.02,
        num_bytes=num_bytes,
        facts={"rows": num_rows, "vocab": vocab, "dtype": "bfloat16", **setting},
    )


def cases() -> dict[str, Callable[[], Work]]:
    """By name: the op, whose it is, and its sizes.

    ``torch`` is eager torch in the same graph, ``compiled`` what Inductor makes of that.
    """
    found: dict[str, Callable[[], Work]] = {}
    compiled = CompiledOps(CompiledOpsConfig(max_graphs=64))
    for n in ROWS:
        for h in (1024, 4096):
            found[f"norm {n} x {h}, triton"] = partial(norm_work, norm.rms_norm, n, h)
            found[f"norm {n} x {h}, torch"] = partial(norm_work, rms_norm_reference, n, h)
            found[f"norm {n} x {h}, compiled"] = partial(norm_work, compiled.rms_norm, n, h)
            found[f"add norm {n} x {h}, compiled"] = partial(add_work, compiled.add_rms_norm_, n, h)
            found[f"add norm {n} x {h}, triton"] = partial(add_work, norm.add_rms_norm_, n, h)
            found[f"add norm {n} x {h}, torch"] = partial(add_work, add_rms_norm_reference_, n, h)
        for f in (3072, 14336):
            silu, plain = activation.silu_and_mul, silu_and_mul_reference
            found[f"silu {n} x {f}, triton"] = partial(gated_work, silu, plain, n, f)
            found[f"silu {n} x {f}, torch"] = partial(gated_work, plain, plain, n, f)
            found[f"silu {n} x {f}, compiled"] = partial(
                gated_work, compiled.silu_and_mul, plain, n, f
            )
    gelu, plain = activation.gelu_tanh_and_mul, gelu_tanh_and_mul_reference
    found["gelu 8192 x 14336, triton"] = partial(gated_work, gelu, plain, 8192, 14336)
    found["norm 8192 x 16384, triton"] = partial(norm_work, norm.rms_norm, 8192, 16384)
    found["norm 8192 x 16 x 128, triton"] = partial(norm_work, norm.rms_norm, 8192, 128, 16)
    for n in ROWS[:3]:
        for v in VOCABS:
            found[f"argmax {n} x {v}, triton"] = partial(argmax_work, argmax.argmax, n, v)
            found[f"argmax {n} x {v}, torch"] = partial(argmax_work, argmax_reference, n, v)
            for name, setting in SETTINGS.items():
                label = f"sample {n} x {v}, {name}"
                found[f"{label}, triton"] = partial(sampling_work, None, n, v, **setting)
                for owner, make in (("triton", FusedSampler), ("torch", TorchSampler)):
                    found[f"{label}, {owner} whole"] = partial(
                        sampling_work, make(), n, v, **setting
                    )
    return found


def run_whole(name: str, make: Callable[[], Work], replays: int) -> dict[str, Any]:
    """Check a case and time it as it is called, host side included."""
    torch.manual_seed(0)
    work = make()
    error = work.error()
    record: dict[str, Any] = {"case": name, "error": error, "bound": work.bound, **work.facts}
    record |= {"num_bytes": work.num_bytes, "timing": "whole"}
    if error > work.bound:
        return record | {"status": "FAILED"}
    times = []
    for _ in range(replays + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in work.calls:
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e6 / len(work.calls))
    median, deciles = statistics.median(times[3:]), statistics.quantiles(times[3:], n=10)
    us = {"median": median, "p10": deciles[0], "p90": deciles[-1], "replays": replays}
    us = {key: round(value, 3) for key, value in us.items()}
    rates = {"TBps": round(work.num_bytes / median / 1e6, 4), "TFLOPps": 0.0}
    return record | {"status": "ok", "us": us, **rates}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--replays", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    host = machine()
    print(host, flush=True)
    failed = 0
    for name, make in cases().items():
        if not any(text in name for text in options.only.split(",")):
            continue
        run = run_whole if name.endswith("whole") else run_case
        record = {"timing": "graph", **run(name, make, options.replays)}
        failed += record["status"] != "ok"
        print(format_row(record), flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps({"kind": "kernel", **record, **host}) + "\n")
        torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
