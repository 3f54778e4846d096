# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Temperature, top-k, top-p, min-p and the draw, in one launch, without a sort of the vocabulary.

A program draws for one row, passing over its logits several times; after the first they lie in L2.
Which tokens a truncation keeps is one number, found by bisection: a pass counts the tokens at or
above a probe, or adds up what they weigh, and moves one end of a bracket whose ends are always
values of the row. So it ends when one distinct value is left, and equal logits cost nothing.
The draw inverts the cumulative distribution, in double precision, in the order of the ids, at one
number that is a hash of (seed, position): SplitMix64 (Steele et al. 2014).

Papers: Holtzman et al. 2019 (top-p); Nguyen et al. 2024 (min-p).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kernels.triton import has_dependent_launch
from kernels.triton.argmax import order_key
from kernels.triton.launch import Launcher, dependent_options, planned

_MAX_BLOCK = 8192  # values a program looks at together
_LAST = tl.constexpr(0x7FFFFFFF)
_FIRST = tl.constexpr(-0x80000000)
_COLDEST = tl.constexpr(1e-37)  # temperatures below it would be zero
#: Probes halve the bracket's values so often, then its representable numbers.
_VALUE_STEPS = tl.constexpr(24)


def sample(logits: Tensor, params: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one token a row.

    A row with a temperature of 0 gives its argmax; so does one with a NaN or a positive infinity,
    of which there is no distribution.

    Parameters
    ----------
    logits : Tensor [L, V]
        fp32, bf16 or fp16; rows may be strided, the last dimension is dense. Not written to.
    params : Tensor [4, L] float32
        Temperature, top-k (0 keeps all), top-p, min-p.
    seeds, positions : Tensor [L] int64

    Returns
    -------
    Tensor [L] int64
        On the device of ``logits``.
    """
    if logits.shape[1] == 0:
        raise ValueError("a draw from rows without a value")
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(out):
        _sample((out, logits, params, seeds, positions))
    return out


@planned
def _sample(
    _out: Tensor, logits: Tensor, params: Tensor, seeds: Tensor, positions: Tensor
) -> Launcher:
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 or vocab == 1
    assert params.shape == (4, num_rows) and params.dtype == torch.float32
    assert params.is_contiguous() and seeds.is_contiguous() and positions.is_contiguous()
    assert seeds.shape == positions.shape == (num_rows,)
    assert seeds.dtype == positions.dtype == torch.int64
    block = min(_MAX_BLOCK, max(128, triton.next_power_of_2(vocab)))
    is_dependent = has_dependent_launch(logits.device)
    return Launcher(
        sample_kernel,
        (num_rows,),
        logits.stride(0),
        vocab,
        num_rows,
        BLOCK=block,
        IS_DEPENDENT=is_dependent,
        num_warps=max(1, block // 256),
        **dependent_options(is_dependent),
    )


@triton.jit
def _uniform(seed, position):
    """One number in [0, 1) of a seed and a position."""
    x = (seed + position * -7046029254386353131).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _value_of(key):
    """The fp32 number of an order key."""
    return (key ^ ((key >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _probe_between(low, high, step):
    """A key above ``low`` and at most ``high``, which is greater: in the middle of them."""
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    if step < _VALUE_STEPS:
        middle = order_key(0.5 * _value_of(low) + 0.5 * _value_of(high))
    return tl.minimum(tl.maximum(middle, low + 1), high)


@triton.jit
def _measure(
    source, vocab, probe, greatest, temperature, IS_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Weight and number of tokens at or above a probe, the least of their keys, and the greatest
    key below."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    above = tl.full([BLOCK], _LAST, tl.int32)
    below = tl.full([BLOCK], _FIRST, tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        index = start + lane
        value = tl.load(source + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        key = order_key(value)
        is_above = key >= probe
        count += is_above.to(tl.int32)
        if IS_MASS:
            mass += tl.where(is_above, tl.exp((value - greatest) / temperature), 0.0)
        above = tl.minimum(above, tl.where(is_above, key, _LAST))
        below = tl.maximum(below, tl.where(is_above, _FIRST, key))
    return tl.sum(mass.to(tl.float64), 0), tl.sum(count, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _find_tied(source, vocab, tied, number, BLOCK: tl.constexpr):
    """Index of the ``number``-th token whose key is ``tied``."""
    lane = tl.arange(0, BLOCK)
    seen = tl.zeros([], tl.int32)
    found = tl.full([], _LAST, tl.int32)
    for start in range(0, vocab, BLOCK):
        index = start + lane
        value = tl.load(source + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        is_tied = (order_key(value) == tied).to(tl.int32)
        rank = seen + tl.cumsum(is_tied, 0)
        is_found = (is_tied == 1) & (rank == number)
        found = tl.minimum(found, tl.min(tl.where(is_found, index, _LAST), 0))
        seen += tl.sum(is_tied, 0)
    return found


@triton.jit
def _weigh(source, index, vocab, low, high, last_tied, greatest, temperature, min_p):
    """Unnormalised probabilities of tokens, 0 of those that are dropped: kept are those above
    ``high``, and from ``low`` on the first ones."""
    value = tl.load(source + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    key = order_key(value)
    weight = tl.exp((value - greatest) / temperature)
    is_kept = (key > high) | ((key >= low) & (index <= last_tied))
    return tl.where(is_kept & (weight >= min_p), weight, 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def sample_kernel(
    out,
    logits,
    settings,  # Triton itself fails over a parameter called params
    seeds,
    positions,
    stride,
    vocab,
    num_rows,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows)."""
    if IS_DEPENDENT:
        gdc_wait()  # of the launch before, only its end is overlapped
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(settings + row)
    top_k = tl.load(settings + num_rows + row).to(tl.int32)
    top_p = tl.load(settings + 2 * num_rows + row)
    min_p = tl.load(settings + 3 * num_rows + row)

    # The argmax, as kernels.triton.argmax has it, and the least finite logit.
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = lane
    least = tl.full([BLOCK], _LAST, tl.int32)
    finite = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        index = start + lane
        value = tl.load(source + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        is_better = ~(value <= best) & (best == best)
        best = tl.where(is_better, value, best)
        at = tl.where(is_better, index, at)
        is_finite = value > float("-inf")
        finite += is_finite.to(tl.int32)
        least = tl.minimum(least, tl.where(is_finite, order_key(value), _LAST))
    pair = tl.max((order_key(best).to(tl.int64) << 32) | (at ^ _LAST).to(tl.int64), 0)
    token = ((pair & _LAST) ^ _LAST).to(tl.int32)
    high = (pair >> 32).to(tl.int32)
    greatest = _value_of(high)
    num_finite = tl.sum(finite, 0)
    low = tl.min(least, 0)

    if (temperature > 0.0) & (tl.abs(greatest) < float("inf")):
        temperature = tl.maximum(temperature, _COLDEST)
        if (top_k > 0) & (top_k < num_finite):
            end = high
            step = 0
            while low < end:
                probe = _probe_between(low, end, step)
                _, count, above, below = _measure(
                    source, vocab, probe, greatest, temperature, False, BLOCK
                )
                if count >= top_k:
                    low = above
                    if count == top_k:
                        end = low
                else:
                    end = below
                step += 1
        keep = low - 1  # of these all are kept
        last_tied = tl.full([], _LAST, tl.int32)
        if top_p < 1.0:
            total, count_low, _, _ = _measure(
                source, vocab, low, greatest, temperature, True, BLOCK
            )
            goal = top_p.to(tl.float64) * total
            mass_low = total
            mass_high = total * 0.0
            count_high = count_low * 0
            end = high
            step = 0
            while low < end:
                probe = _probe_between(low, end, step)
                mass, count, above, below = _measure(
                    source, vocab, probe, greatest, temperature, True, BLOCK
                )
                if mass >= goal:
                    low = above
                    mass_low = mass
                    count_low = count
                else:
                    end = below
                    mass_high = mass
                    count_high = count
                step += 1
            # One value is left: of the tokens that have it, the first ones fill the nucleus.
            num_tied = count_low - count_high
            each = (mass_low - mass_high) / num_tied
            if mass_high + each * (num_tied - 1) >= goal:
                number = tl.ceil((goal - mass_high) / each).to(tl.int32)
                number = tl.minimum(tl.maximum(number, 1), num_tied)
                last_tied = _find_tied(source, vocab, low, number, BLOCK)
            keep = low

        masses = tl.zeros([BLOCK], tl.float64)
        last = tl.full([BLOCK], -1, tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=3):
            index = start + lane
            weight = _weigh(
                source, index, vocab, low, keep, last_tied, greatest, temperature, min_p
            )
            masses += weight.to(tl.float64)
            last = tl.maximum(last, tl.where(weight > 0.0, index, -1))
        target = tl.sum(masses, 0) * _uniform(tl.load(seeds + row), tl.load(positions + row))
        # A target that rounds up to the total would fall past the end: the last token with mass.
        token = tl.max(last, 0)
        before = target * 0.0
        start = 0
        while start < vocab:
            index = start + lane
            weight = _weigh(
                source, index, vocab, low, keep, last_tied, greatest, temperature, min_p
            ).to(tl.float64)
            mass = tl.sum(weight, 0)
            start += BLOCK
            if before + mass > target:
                until = before + tl.cumsum(weight, 0)
                is_drawn = (until > target) & (weight > 0.0)
                drawn = tl.min(tl.where(is_drawn, index, _LAST), 0)
                # The two sums may differ in their last bit.
                ending = tl.max(tl.where(weight > 0.0, index, -1), 0)
                token = tl.minimum(drawn, ending)
                start = vocab
            before += mass
    tl.store(out + row, token.to(tl.int64))


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(num_rows: int, vocab: int, dtype: torch.dtype) -> Callable[[], object]:
        logits = torch.empty(num_rows, vocab, dtype=dtype, device="meta")
        params = torch.empty(4, num_rows, device="meta")
        index = torch.empty(num_rows, dtype=torch.int64, device="meta")
        return lambda: sample(logits, params, index, index)

    return {
        "bf16, 1 x 128256": call(1, 128256, torch.bfloat16),
        "fp32, 256 x 151936": call(256, 151936, torch.float32),
        "fp16, 32 x 500": call(32, 500, torch.float16),
    }
