"""A GGUF file, opened and checked: metadata as plain Python values, tensors as views of the file.

The layout is the GGUF specification's (ggml repository, docs/gguf.md), versions 2 and 3, little
endian. The header is read here rather than by `gguf.GGUFReader`, which makes several numpy objects
for each of a vocabulary's strings (seconds, where this takes tenths) and does not say which part
of a short file is missing. Type tables and dequantisation are the `gguf` package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from workbench.models.store.errors import BrokenModelError, UnsupportedModelError

GGUF_MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
#: Elements of one dequantisation step's rows: enough to outweigh numpy's call cost, still in L2.
DEQUANTIZE_ROW_ELEMENTS = 8192

_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in a GGUF file.

    Attributes
    ----------
    name
        GGUF name.
    shape
        Shape in torch order (the file lists dimensions fastest-varying first).
    ggml_type
        How the values are stored.
    offset, num_bytes
        Byte range, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class GgufFile:
    """Read-only view of one GGUF file.

    Parameters
    ----------
    path
        The ``.gguf`` file.

    Attributes
    ----------
    metadata
        Every key of the file, as str, int, float, bool or a list of these.
    tensors
        `GgufTensor` by GGUF name, in file order.
    architecture
        ``general.architecture``, e.g. ``"llama"``.

    Raises
    ------
    BrokenModelError
        If the file is absent, not GGUF, or shorter than its own header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BrokenModelError(f"{self.path}: no such file")
        with self.path.open("rb") as stream:
            magic = stream.read(len(GGUF_MAGIC))
            if magic != GGUF_MAGIC:
                raise BrokenModelError(
                    f"{self.path}: not a GGUF file (it starts with {magic!r}, not {GGUF_MAGIC!r})"
                )
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = _HeaderReader(self._map, offset=len(GGUF_MAGIC))
            self._read_header(header)
        except (struct.error, ValueError, ArithmeticError, IndexError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise BrokenModelError(
                f"{self.path}: truncated or damaged GGUF file ({error}); get it again"
            ) from error
        self.architecture: str = self.require("general.architecture")

    def _read_header(self, header: _HeaderReader) -> None:
        (version,) = header.scalars("I", 1)
        if version not in SUPPORTED_VERSIONS:
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version} (or a big-endian file) is not supported; "
                f"supported: versions {', '.join(map(str, SUPPORTED_VERSIONS))}, little endian"
            )
        num_tensors, num_keys = header.scalars("Q", 2)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = header.string()
            self.metadata[key] = header.value(header.value_type())
        entries = [header.tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-header.offset // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, ggml_type, offset in entries:
            block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
            if shape[-1] % block_size:
                raise ValueError(f"rows of {name!r} are not whole {ggml_type.name} blocks")
            num_bytes = math.prod(shape) // block_size * block_bytes
            if start + offset + num_bytes > len(self._map):
                raise ValueError(f"tensor {name!r} reaches past the end of the file")
            self.tensors[name] = GgufTensor(name, shape, ggml_type, start + offset, num_bytes)

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata value under `key`; `default` if absent."""
        return self.metadata.get(key, default)

    def require(self, key: str) -> Any:
        """Metadata value under `key`; `BrokenModelError` if the file does not state it."""
        if key not in self.metadata:
            raise BrokenModelError(
                f"{self.path}: the metadata key {key!r} is missing, so it is not a whole model"
            )
        return self.metadata[key]

    def arch_get(self, key: str, default: Any = None) -> Any:
        """`get` for a key under the file's own architecture, e.g. ``llama.block_count``."""
        return self.get(f"{self.architecture}.{key}", default)

    def arch_require(self, key: str) -> Any:
        """`require` for a key under the file's own architecture."""
        return self.require(f"{self.architecture}.{key}")

    def quantization_summary(self) -> dict[str, int]:
        """Number of tensors of each GGML type, e.g. ``{"Q4_1": 210, "F32": 61}``."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.ggml_type.name] = counts.get(tensor.ggml_type.name, 0) + 1
        return counts

    def dequantize(self, name: str) -> torch.Tensor:
        """Values of tensor `name` in fp32: a new contiguous tensor of the tensor's shape.

        Raises
        ------
        UnsupportedModelError
            If the `gguf` package cannot dequantise the tensor's GGML type.
        """
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.ggml_type]
        row_bytes = _step_elements(tensor) // block_size * block_bytes
        try:
            values = dequantize(raw.reshape(-1, row_bytes), tensor.ggml_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} is stored as {tensor.ggml_type.name}, which cannot "
                "be dequantised; use a file in F32, F16, BF16, Q4_0 to Q8_0 or a K-quant"
            ) from error
        if not values.flags.writeable:  # fp32 values are a view of the file
            values = values.copy()
        return torch.from_numpy(values).reshape(tensor.shape)


def _step_elements(tensor: GgufTensor) -> int:
    """Row length to dequantise by: whole rows together, since blocks do not care where rows end.

    The largest divisor of the tensor that is a multiple of its rows and within
    `DEQUANTIZE_ROW_ELEMENTS`, or one row.
    """
    row = tensor.shape[-1]
    num_rows = tensor.num_elements // row
    for rows in range(max(1, min(num_rows, DEQUANTIZE_ROW_ELEMENTS // row)), 1, -1):
        if num_rows % rows == 0:
            return rows * row
    return row


class _HeaderReader:
    """Reads values one after the other; a read past the end is a `ValueError`."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self._data = data
        self.offset = offset

    def _take(self, num_bytes: int) -> bytes:
        end = self.offset + num_bytes
        if end > len(self._data):
            raise ValueError(f"the header reaches past the end of the file, at byte {self.offset}")
        taken = self._data[self.offset : end]
        self.offset = end
        return taken

    def scalars(self, kind: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{kind}"
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.scalars("Q", 1)
        return self._take(length).decode("utf-8")

    def value_type(self) -> GGUFValueType:
        return GGUFValueType(self.scalars("I", 1)[0])

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item_kind = self.value_type()
            (count,) = self.scalars("Q", 1)
            if item_kind in _SCALAR_FORMATS:
                return list(self.scalars(_SCALAR_FORMATS[item_kind], count))
            return [self.value(item_kind) for _ in range(count)]
        return self.scalars(_SCALAR_FORMATS[kind], 1)[0]

    def tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string()
        (num_dims,) = self.scalars("I", 1)
        shape = tuple(reversed(self.scalars("Q", num_dims)))
        (type_number,) = self.scalars("I", 1)
        (offset,) = self.scalars("Q", 1)
        return name, shape, GGMLQuantizationType(type_number), offset
