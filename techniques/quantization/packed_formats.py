"""Checkpoints whose weights alone are quantised: what they say of themselves, and their layers.

``n = 32 / bits`` codes lie in an int32, the first in the lowest bits. ``[N, K]`` is a layer's
weight, ``G`` its number of groups.

==================  ===============================================================================
``quant_method``    tensors of a layer
==================  ===============================================================================
compressed-tensors  :mod:`techniques.quantization.compressed_tensors`; with ``actorder: group`` also
                    ``weight_g_idx`` ``[K]``, the group of each input
gptq                ``qweight`` ``[K / n, N]`` packed along the inputs, ``qzeros`` ``[G, N / n]``
                    along the outputs, ``scales`` ``[G, N]``, ``g_idx`` ``[K]``. A zero point is
                    stored less one, in ``checkpoint_format: gptq_v2`` as it is
awq                 ``qweight`` ``[K, N / 8]``, ``qzeros`` ``[G, N / 8]``, both packed along the
                    outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, and ``scales`` ``[G, N]``
auto-round          either of the two before, as ``packing_format`` has it
==================  ===============================================================================

Sources: compressed-tensors 0.20; AutoGPTQ and GPTQModel; AutoAWQ's ``WQLinear_GEMM``; AutoRound.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from techniques.quantization import compressed_tensors
from techniques.quantization.compressed_tensors import PACKED, SCALE, ZERO, codes_of, unpack_words
from techniques.quantization.weights import BITS, WeightScheme
from workbench.core.errors import ConfigError, UnsupportedError

QWEIGHT, QZEROS, SCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
HEAD = "lm_head"
#: Output whose code lies in each place of a word, of AWQ.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AUTO_ROUND = ("auto-round", "intel/auto-round")
METHODS = (compressed_tensors.METHOD, "gptq", "awq", AUTO_ROUND[0])

#: Scheme of a layer by its name in the checkpoint; None: it stays in the model's dtype.
SchemeOf = Callable[[str], WeightScheme | None]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
#: Codes ``[N, K]``, scales ``[N, G]`` and zero points ``[N, G]``.
Decoded = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Layout(ABC):
    """How the tensors of a layer are written down.

    Attributes
    ----------
    index
        What the group of each input is called; None: groups are consecutive inputs.
    needs_index
        Whether a layer without it is broken.
    adds_bias
        Whether writers give a bias of zeros to layers that have none.
    """

    index: str | None = None
    needs_index: bool = False
    adds_bias: bool = False

    @abstractmethod
    def shapes(self, scheme: WeightScheme, rows: int, columns: int) -> Shapes:
        """Shapes and dtypes of the tensors of a layer ``[N, K]``, by their suffix."""

    @abstractmethod
    def decode(
        self, params: Mapping[str, Tensor], scheme: WeightScheme, rows: int, columns: int
    ) -> Decoded:
        """What the tensors stand for; codes of ``scheme``, so from 0 on with zero points."""

    def uneven(self, scheme: WeightScheme, widths: Sequence[int], columns: int) -> str | None:
        """Why a layer's words cannot be told apart, if so; ``widths`` are the outputs of the
        checkpoint's layers that are stacked."""
        per_word = 32 // scheme.bits
        if scheme.has_zeros and any(width % per_word for width in widths):
            return f"outputs that {per_word} does not divide, and zero points"
        return None


class CompressedLayout(Layout):
    """``pack-quantized`` of compressed-tensors."""

    def shapes(self, scheme: WeightScheme, rows: int, columns: int) -> Shapes:
        per_word, num_groups = 32 // scheme.bits, scheme.num_groups(columns)
        found: Shapes = {
            PACKED: ((rows, -(-columns // per_word)), torch.int32),
            SCALE: ((rows, num_groups), torch.float32),
        }
        if scheme.has_zeros:
            found[ZERO] = ((rows // per_word, num_groups), torch.int32)
        return found

    def decode(
        self, params: Mapping[str, Tensor], scheme: WeightScheme, rows: int, columns: int
    ) -> Decoded:
        codes, zeros = codes_of(params[PACKED], params.get(ZERO), scheme, columns)
        return codes, params[SCALE], zeros


@dataclass(frozen=True, slots=True)
class GPTQLayout(Layout):
    """Words of codes of consecutive inputs.

    Attributes
    ----------
    zeros_less_one
        Whether zero points are stored less one (``checkpoint_format: gptq``).
    """

    zeros_less_one: bool = True

    def shapes(self, scheme: WeightScheme, rows: int, columns: int) -> Shapes:
        per_word, num_groups = 32 // scheme.bits, scheme.num_groups(columns)
        return {
            QWEIGHT: ((columns // per_word, rows), torch.int32),
            QZEROS: ((num_groups, rows // per_word), torch.int32),
            SCALES: ((num_groups, rows), torch.float32),
        }

    def uneven(self, scheme: WeightScheme, widths: Sequence[int], columns: int) -> str | None:
        if columns % (32 // scheme.bits):
            return f"{columns} inputs, which {32 // scheme.bits} does not divide"
        # Zero arguments of super() have no class to refer to where slots make a new one.
        return Layout.uneven(self, scheme, widths, columns)

    def decode(
        self, params: Mapping[str, Tensor], scheme: WeightScheme, rows: int, columns: int
    ) -> Decoded:
        codes = unpack_words(params[QWEIGHT].T.contiguous(), scheme.bits, columns)
        zeros = unpack_words(params[QZEROS], scheme.bits, rows).T.contiguous()
        if self.zeros_less_one:
            zeros = zeros + 1
            if bool((zeros > scheme.greatest).any()):
                raise UnsupportedError(
                    "zero points of 0, which this format cannot hold: it stores them less one, and "
                    "its readers do not agree on what comes of it. Take a checkpoint with "
                    "checkpoint_format 'gptq_v2'."
                )
        return codes, params[SCALES].T.contiguous(), zeros


class AWQLayout(Layout):
    """Words of codes of eight outputs, even ones first."""

    def shapes(self, scheme: WeightScheme, rows: int, columns: int) -> Shapes:
        num_groups = scheme.num_groups(columns)
        return {
            QWEIGHT: ((columns, rows // 8), torch.int32),
            QZEROS: ((num_groups, rows // 8), torch.int32),
            SCALES: ((num_groups, rows), torch.float32),
        }

    def decode(
        self, params: Mapping[str, Tensor], scheme: WeightScheme, rows: int, columns: int
    ) -> Decoded:
        place_of = torch.tensor(AWQ_ORDER).argsort()

        def outputs_first(words: Tensor) -> Tensor:
            places = unpack_words(words, scheme.bits, rows).view(len(words), -1, 8)
            return places[:, :, place_of.to(words.device)].reshape(len(words), rows).T.contiguous()

        zeros = outputs_first(params[QZEROS])
        return outputs_first(params[QWEIGHT]), params[SCALES].T.contiguous(), zeros


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How a checkpoint has its weights: a layout for all layers, and the scheme of each."""

    method: str
    layout: Layout
    scheme_of: SchemeOf = field(repr=False)


def read_packed_config(config: Mapping[str, Any]) -> PackedFormat:
    """How a checkpoint has its weights, from its ``quantization_config``.

    Raises
    ------
    UnsupportedError
        Another method, or an option of it that no layout here has; it is named with what is valid.
    """
    method = config.get("quant_method")
    if method == compressed_tensors.METHOD:
        return _compressed(config)
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        return _awq(config)
    if method in AUTO_ROUND:
        return _auto_round(config)
    raise UnsupportedError(
        f"the checkpoint is quantised by {method!r}; {', '.join(map(repr, METHODS))} are read."
    )


def _compressed(config: Mapping[str, Any]) -> PackedFormat:
    scheme, ignored = compressed_tensors.read_config(config)
    (group,) = config["config_groups"].values()
    by_group = compressed_tensors.is_ordered_by_group(group["weights"])
    layout = CompressedLayout(compressed_tensors.INDEX if by_group else None, needs_index=by_group)
    return PackedFormat(
        compressed_tensors.METHOD,
        layout,
        lambda name: None if compressed_tensors.is_kept(name, ignored) else scheme,
    )


def _gptq(config: Mapping[str, Any]) -> PackedFormat:
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        found = "marlin" if config.get("is_marlin_format") else form
        raise UnsupportedError(
            f"the checkpoint is of gptq in checkpoint_format {found!r}; 'gptq' and 'gptq_v2' are "
            "read."
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedError(
            f"the checkpoint has its codes in {config['pack_dtype']}; words of int32 are read."
        )
    inside = config.get("modules_in_block_to_quantize") or ()
    names = [n for part in inside for n in ([part] if isinstance(part, str) else part)]
    rules = dict(config.get("dynamic") or {})
    default = _scheme("the checkpoint", config)
    schemes = {rule: _scheme(f"its rule {rule!r}", {**config, **new})
               for rule, new in rules.items() if not rule.startswith("-:")}  # fmt: skip

    def scheme_of(name: str) -> WeightScheme | None:
        if name == HEAD and not config.get("lm_head"):
            return None
        if names and name != HEAD and not any(name.endswith(f".{part}") for part in names):
            return None
        for rule in rules:
            if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
                return schemes.get(rule)
        return default

    # An index is also written where it says nothing, but not by everyone.
    needs_index = bool(config.get("desc_act"))
    return PackedFormat("gptq", GPTQLayout(G_IDX, needs_index, True, form == "gptq"), scheme_of)


def _awq(config: Mapping[str, Any]) -> PackedFormat:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(f"the checkpoint is of awq in version {version!r}; 'gemm' is read.")
    old = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size")}
    scheme = _scheme("the checkpoint", {**old, **config}, bits=(4,))
    kept = [HEAD, *(config.get("modules_to_not_convert") or ())]
    # Writers leave out every layer that has an entry anywhere in its name.
    return PackedFormat(
        "awq",
        AWQLayout(adds_bias=True),
        lambda name: None if any(entry in name for entry in kept) else scheme,
    )


def _auto_round(config: Mapping[str, Any]) -> PackedFormat:
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
    known = {"auto_gptq": False, "gptq": False, "auto_awq": True, "awq": True}
    prefix, _, rest = packing.partition(":")
    is_awq = known.get(rest.partition(":")[0])
    if prefix != "auto_round" or is_awq is None:
        raise UnsupportedError(
            f"the checkpoint is of auto-round in packing_format {packing!r}; "
            "'auto_round:auto_gptq' and 'auto_round:auto_awq' are read."
        )
    widths = (4,) if is_awq else BITS
    default = _scheme("the checkpoint", config, bits=widths)
    exceptions: dict[str, WeightScheme | None] = {}
    for name, new in (config.get("extra_config") or {}).items():
        merged = {**config, **new}
        is_kept = int(merged.get("bits") or 0) >= 16
        exceptions[name] = None if is_kept else _scheme(f"its layer {name!r}", merged, bits=widths)
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    starts = [n for part in blocks for n in ([part] if isinstance(part, str) else part)]

    def scheme_of(name: str) -> WeightScheme | None:
        if name in exceptions:
            return exceptions[name]
        for pattern, scheme in exceptions.items():
            if re.search(r"[*+?^$()\[\]{}|\\]", pattern) and re.search(pattern, name):
                return scheme
        if name == HEAD or (starts and not name.startswith(tuple(starts))):
            return None
        return default

    if is_awq:
        return PackedFormat("auto-round", AWQLayout(adds_bias=True), scheme_of)
    return PackedFormat("auto-round", GPTQLayout(G_IDX, False, True), scheme_of)


def _scheme(of: str, config: Mapping[str, Any], bits: Sequence[int] = BITS) -> WeightScheme:
    """The scheme that fields ``bits`` and ``group_size`` name; -1 is one scale an output."""
    width, size = config.get("bits"), config.get("group_size")
    valid = ", ".join(map(str, bits))
    if not isinstance(width, int) or width not in bits:
        raise UnsupportedError(f"{of} has weights of {width} bits; {valid} bits are read.")
    if str(config.get("data_type", "int")) != "int":
        raise UnsupportedError(f"{of} has data_type {config['data_type']!r}; 'int' is read.")
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
        raise UnsupportedError(
            f"{of} has group_size {size!r}; -1 (one scale an output) and whole numbers such as 32, "
            "64 and 128 are read."
        )
    return WeightScheme(width, max(size, 0), has_zeros=True)


def consecutive_index(scheme: WeightScheme, columns: int) -> Tensor:
    """Group of each input ``[K]`` int32 where groups are consecutive inputs."""
    return torch.arange(columns, dtype=torch.int32) // (columns // scheme.num_groups(columns))


def checked_index(name: str, index: Tensor, scheme: WeightScheme) -> Tensor | None:
    """An index ``[K]`` as products take it; None: consecutive groups.

    Raises
    ------
    UnsupportedError
        It names groups that the layer does not have, or groups of unequal sizes.
    """
    columns = len(index)
    num_groups = scheme.num_groups(columns)
    if bool((index == -1).all()):  # as it was created: nothing was reordered
        return None
    if bool(((index < 0) | (index >= num_groups)).any()):
        raise UnsupportedError(
            f"layer {name} has a group index from {int(index.min())} to {int(index.max())}, and "
            f"groups 0 to {num_groups - 1}: the checkpoint is broken."
        )
    counts = torch.bincount(index.long(), minlength=num_groups)
    if bool((counts != counts[0]).any()):
        raise UnsupportedError(
            f"layer {name} has groups of {int(counts.min())} to {int(counts.max())} inputs; all "
            f"must have {columns // num_groups}."
        )
    return None if bool((index[1:] >= index[:-1]).all()) else index


def checked_groups(name: str, scheme: WeightScheme, columns: int) -> None:
    """Raise where the groups of a scheme do not divide the inputs of a layer."""
    try:
        scheme.num_groups(columns)
    except ConfigError as error:
        raise UnsupportedError(f"layer {name} of the checkpoint: {error}") from error
