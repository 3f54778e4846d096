# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Few rows times a weight of 4 or 8 bits on tensor cores, in Triton, K shared out among warps.

Sharing a tile's columns among programs (:mod:`kernels.triton.quantized_gemm`) costs more than a
small weight takes to be read: sums are written, counted and read again. Here a program has 16 or
32 rows of the weight and all of their columns, each of its warps a chunk of 128 at a time, and the
warps' sums meet in shared memory. So there are as many programs as keep every multiprocessor busy,
none of them waits for another, and a step along K of all warps is a batch of products.

Numbers are made and scaled as in :mod:`kernels.triton.quantized_gemm_kernel`. Before it waits for
the launch ahead, a program asks the L2 cache for its first weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton import has_dependent_launch, is_interpreted, num_multiprocessors
from kernels.triton.activation import ACTIVATIONS
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.prefetch import prefetch
from kernels.triton.quantized_gemm_kernel import decode, decode_runs, decoder, store_tile
from kernels.triton.quantized_layout import CHUNK, TILE_ROWS, group_of, num_chunks, packed_shape

MAX_ROWS = 32
_TILE_ROWS = tl.constexpr(TILE_ROWS)


@dataclass(frozen=True, slots=True)
class QuantizedSplitTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_n
        Rows of the weight that a program takes: 16, or 32.
    num_warps
        Of a program; each has a chunk of 128 columns at a time.
    num_stages
        Steps along K that are on their way at a time.
    prefetched
        Steps that a program asks the L2 cache for before it waits for the launch ahead.
    """

    block_n: int
    num_warps: int
    num_stages: int
    prefetched: int = 2


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_split_kernel(
    out,
    x,
    words,
    scales,
    zeros,
    bias,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    chunks,
    num_groups,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DECODE_0: tl.constexpr,
    DECODE_1: tl.constexpr,
    DECODE_2: tl.constexpr,
    DECODE_3: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles of the output's columns). A tile of a gated product holds as many rows of the
    gate as of what it multiplies.

    ``GROUP`` is 0 for one scale an output. ``IS_EVEN``: the last step ends where x does.
    """
    STORED: tl.constexpr = 32 if BITS == 4 else 128  # words of 16 bits, or bytes, of a chunk's row
    WIDTH: tl.constexpr = BLOCK_N if ACTIVATION == "none" else BLOCK_N // 2
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)
    part = tl.arange(0, SPLIT)
    token = tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    source = tl.minimum(tile * WIDTH + row % WIDTH, out_features - 1)
    source += row // WIDTH * out_features
    at = (source // _TILE_ROWS).to(tl.int64) * chunks * (_TILE_ROWS * STORED)
    at += source % _TILE_ROWS * STORED
    if BITS == 4:
        codes = words.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        codes = words.to(tl.pointer_type(tl.int8), bitcast=True)
    if IS_DEPENDENT:
        gdc_launch_dependents()
        if PREFETCHED > 0:
            first = tl.arange(0, BLOCK_N // _TILE_ROWS) * _TILE_ROWS  # rows of tiles
            first_row = tl.minimum(tile * WIDTH + first % WIDTH, out_features - 1)
            first_row += first // WIDTH * out_features
            SIZE: tl.constexpr = 32  # words: 128 bytes, so that threads have places of their own
            IN_CHUNK: tl.constexpr = _TILE_ROWS * BITS * 4 // SIZE
            piece = tl.arange(0, PREFETCHED * SPLIT * IN_CHUNK)
            piece = tl.minimum(piece, chunks * IN_CHUNK - 1) * SIZE
            tiles = (first_row // _TILE_ROWS).to(tl.int64) * chunks * (IN_CHUNK * SIZE)
            prefetch(words + tiles[:, None] + piece[None, :], SIZE)
        gdc_wait()  # the launch before wrote x
    # Of 8 bits in small groups, a product has a part of a chunk's row; of 4 bits a row holds all.
    TAKEN: tl.constexpr = STORED if GROUP % 128 == 0 else 32
    w_rows = codes + at[None, :, None] + tl.arange(0, TAKEN)[None, None, :]
    PIECE: tl.constexpr = 128 if GROUP % 128 == 0 else 32  # columns of a product
    column = tl.arange(0, PIECE)
    x_rows = x + (token.to(tl.int64) * x_stride)[None, :, None] + column[None, None, :]
    acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_T], tl.float32)
    s = _load_groups(scales, 0, 0, source, num_groups, num_rows, GROUP, SPLIT)
    for step in tl.range(0, tl.cdiv(chunks, SPLIT), num_stages=STAGES):
        chunk = step * SPLIT + part
        mask = is_token[None, :, None]
        if IS_EVEN:
            read = chunk
        else:
            read = tl.minimum(chunk, chunks - 1)
            left = (in_features - chunk * 128)[:, None, None]  # columns
            if GROUP % 128 == 0:
                mask = mask & (column[None, None, :] < left)
        w_step = w_rows + (read * (_TILE_ROWS * STORED))[:, None, None]
        x_step = x_rows + (chunk * 128)[:, None, None]
        if GROUP % 128 == 0:
            w = tl.load(w_step)
            values = tl.load(x_step, mask=mask, other=0.0)
            z = s
            if zeros is not None:
                z = _load_zeros(
                    zeros, step * SPLIT, 0, source, num_groups, num_rows, BITS, GROUP, SPLIT, x
                )
            # Of the next step, on their way while this one is multiplied.
            next_s = _load_groups(
                scales, (step + 1) * SPLIT, 0, source, num_groups, num_rows, GROUP, SPLIT
            )
            if BITS == 4:
                runs = decode_runs(
                    w, s[:, :, None], z[:, :, None], x, zeros, False,
                    DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
                )  # fmt: skip
                numbers = tl.reshape(tl.permute(runs, (0, 1, 4, 3, 2)), [SPLIT, BLOCK_N, 128])
            else:
                numbers = decode(
                    w, s[:, :, None], z[:, :, None], x, zeros, 0, BITS, False,
                    DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
                )  # fmt: skip
            columns = _as_columns(values, IS_INTERPRETED)
            if GROUP == 0:
                acc = tl.dot(numbers, columns, acc, input_precision="ieee")
            else:
                sums = tl.dot(numbers, columns, input_precision="ieee")
                acc += sums * s.to(tl.float32)[:, :, None]
                s = next_s
        else:
            if BITS == 4:
                w = tl.load(w_step)
            for RUN in tl.static_range(4):
                if BITS == 8:
                    w = tl.load(w_step + RUN * 32)
                taken = mask
                if not IS_EVEN:
                    taken = taken & (RUN * 32 + column[None, None, :] < left)
                values = tl.load(x_step + RUN * 32, mask=taken, other=0.0)
                if RUN * 32 % GROUP == 0:
                    at_column = RUN * 32
                    s = _load_groups(
                        scales, step * SPLIT, at_column, source, num_groups, num_rows, GROUP, SPLIT
                    )
                    z = s
                    if zeros is not None:
                        z = _load_zeros(
                            zeros, step * SPLIT, at_column, source, num_groups, num_rows,
                            BITS, GROUP, SPLIT, x,
                        )  # fmt: skip
                    sums = tl.zeros([SPLIT, BLOCK_N, BLOCK_T], tl.float32)
                numbers = decode(
                    w, s[:, :, None], z[:, :, None], x, zeros, RUN if BITS == 4 else 0, BITS,
                    False, DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
                )  # fmt: skip
                columns = _as_columns(values, IS_INTERPRETED)
                sums = tl.dot(numbers, columns, sums, input_precision="ieee")
                if (RUN + 1) * 32 % GROUP == 0:
                    acc += sums * s.to(tl.float32)[:, :, None]
    total = tl.sum(acc, 0)
    if GROUP == 0:
        total *= tl.load(scales + source).to(tl.float32)[:, None]
    store_tile(out, total, bias, source, tile, token, is_token, out_features, ACTIVATION)


@triton.jit
def _load_groups(
    grid,
    first,
    at_column,
    source,
    num_groups,
    num_rows,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Scales or zero points of a column of each chunk from ``first`` on, ``[chunks, rows]``."""
    if GROUP == 0:
        group = tl.zeros([SPLIT], tl.int32)
    else:
        group = ((first + tl.arange(0, SPLIT)) * 128 + at_column) // GROUP
        group = tl.minimum(group, num_groups - 1)
    return tl.load((grid + group.to(tl.int64) * num_rows)[:, None] + source[None, :])


@triton.jit
def _load_zeros(
    zeros,
    first,
    at_column,
    source,
    num_groups,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    x,
):
    """What to add to numbers for their zero points, ``[chunks, rows]``."""
    IS_HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    BASE: tl.constexpr = (1024.0 if IS_HALF else 128.0) if BITS == 4 else 0.0
    z = _load_groups(zeros, first, at_column, source, num_groups, num_rows, GROUP, SPLIT)
    return (-BASE - z.to(tl.float32)).to(tl.float16 if IS_HALF else tl.bfloat16)


@triton.jit
def _as_columns(values, IS_INTERPRETED: tl.constexpr):
    """Rows of x as the tensor cores take them, in 16 bits."""
    if values.dtype == tl.float32:
        values = values.to(tl.bfloat16)
    if IS_INTERPRETED:  # numpy has no bf16
        values = values.to(tl.float32)
    return tl.permute(values, (0, 2, 1))


def quantized_split(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    rows: int,
    activation: str | None = None,
    tiling: QuantizedSplitTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, or that activation of its first half times the second.

    Parameters
    ----------
    x : Tensor [T, K]
        fp32, bf16 or fp16, up to ``MAX_ROWS`` rows, which may lie apart; fp32 is rounded to bf16.
    words, scales, zeros, bias, bits, rows, activation, is_dependent
        As of :func:`kernels.triton.quantized_gemm.quantized_gemm`.
    tiling : QuantizedSplitTiling or None
        None: :func:`choose_tiling`.

    Returns
    -------
    Tensor [T, N], [T, F] with an activation
        In the dtype of ``x``; sums are fp32, rounded once.

    Notes
    -----
    Never waits for the device, and shares no memory with other launches. Weights must not have been
    written by the launch ahead.
    """
    num_tokens = x.shape[0]
    if num_tokens > MAX_ROWS:
        raise ValueError(f"{num_tokens} rows: this kernel takes up to {MAX_ROWS}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    out_features = rows if activation is None else rows // 2
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel():
        tensors = (out, x, words, scales, zeros, bias)
        _split(tensors, bits, rows, activation or "none", tiling, is_dependent)
    return out


@planned
def _split(
    out: Tensor,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    _bias: Tensor | None,
    bits: int,
    rows: int,
    activation: str,
    tiling: QuantizedSplitTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    (num_tokens, in_features), out_features = x.shape, out.shape[1]
    num_groups = scales.shape[0]
    group = group_of(in_features, num_groups)
    assert words.shape == packed_shape(rows, in_features, bits) and words.is_contiguous()
    assert scales.shape == (num_groups, rows) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    if tiling is None:
        tiling = choose_tiling(rows, in_features, bits, num_tokens, x.device)
        if x.dtype == torch.float32:  # as many bytes
            tiling = replace(tiling, num_stages=2, num_warps=min(4, tiling.num_warps))
    block_n = tiling.block_n if activation == "none" else max(32, tiling.block_n)
    width = block_n if activation == "none" else block_n // 2
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    is_half = x.dtype == torch.float16
    decoders = [decoder(run, is_half, zeros is not None, False) for run in range(4)]
    return Launcher(
        quantized_split_kernel,
        (triton.cdiv(out_features, width),),
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        num_chunks(in_features),
        num_groups,
        rows,
        BITS=bits,
        GROUP=group,
        BLOCK_T=max(8, triton.next_power_of_2(num_tokens)),
        BLOCK_N=block_n,
        SPLIT=tiling.num_warps,
        STAGES=tiling.num_stages,
        PREFETCHED=tiling.prefetched,
        IS_EVEN=in_features % (CHUNK * tiling.num_warps) == 0,
        ACTIVATION=activation,
        DECODE_0=decoders[0] if bits == 4 else "",
        DECODE_1=decoders[1] if bits == 4 else "",
        DECODE_2=decoders[2] if bits == 4 else "",
        DECODE_3=decoders[3] if bits == 4 else "",
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


def choose_tiling(
    rows: int, in_features: int, bits: int, num_tokens: int, device: torch.device
) -> QuantizedSplitTiling:
    """The cut that suits a shape (``experiments.gpu_quantized --tune``)."""
    warps = min(8, triton.next_power_of_2(num_chunks(in_features)))
    large = rows > 96 * num_multiprocessors(device)
    return QuantizedSplitTiling(32 if large else 16, warps, 3 if num_tokens <= 16 else 2)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str, group: int = 0
    ) -> Callable[[], object]:
        def run() -> object:
            bits = 8 if "w8" in form else 4
            shape = (in_features // group if group else 1, rows)
            return quantized_split(
                torch.empty(num_tokens, in_features, dtype=dtype),
                torch.empty(packed_shape(rows, in_features, bits), dtype=torch.int32),
                torch.empty(shape, dtype=dtype),
                torch.empty(shape, dtype=torch.int8) if "zeros" in form else None,
                torch.empty(rows, dtype=dtype) if "bias" in form else None,
                bits=bits,
                rows=rows,
                activation=next((a for a in ACTIVATIONS if a in form), None),
            )

        return run

    half = torch.bfloat16
    return {
        "w4g128, 16 x 4096 x 4096": call(half, 16, 4096, 4096, "w4", 128),
        "w4g128z, 16 x 28672 x 4096, silu": call(half, 16, 28672, 4096, "w4 zeros silu", 128),
        "w4, fp16, 1 x 100 x 1000, bias": call(torch.float16, 1, 100, 1000, "w4 bias"),
        "w4g256, fp32, 32 x 100 x 1024": call(torch.float32, 32, 100, 1024, "w4", 256),
        "w4g32z, 16 x 4096 x 4096": call(half, 16, 4096, 4096, "w4 zeros", 32),
        "w8g64, 2 x 4096 x 4096": call(half, 2, 4096, 4096, "w8", 64),
        "w8, 16 x 4096 x 4096": call(half, 16, 4096, 4096, "w8"),
        "w8g128z, 3 x 28672 x 4096, gelu": call(half, 3, 28672, 4096, "w8 zeros gelu_tanh", 128),
    }
