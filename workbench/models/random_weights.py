"""Seeded random weights: the true shape of any config without reading a weight file.

Each tensor has a generator of its own, seeded by the seed and the tensor's name in the checkpoint,
so that a weight depends neither on the order of drawing nor on how layers are stacked. It does
depend on the dtype and on the kind of device: generators of a CPU and of a GPU differ.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from workbench.core.errors import WorkbenchError
from workbench.models.checkpoint import write_index
from workbench.models.families import family_of, read_config, spec_from_hf
from workbench.models.parameters import Parameter, checkpoint_parameters
from workbench.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class RandomWeights:
    """Draws each tensor when it is asked for, on the device.

    Matrices, embeddings and biases are normal with ``spec.initializer_range``; norms are the
    identity.

    Parameters
    ----------
    seed
        Same seed, dtype and kind of device: same weights.
    """

    def __init__(
        self, spec: ModelSpec, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.std = spec.initializer_range
        self.norm_value = 1.0 - spec.norm_offset
        self.seed = seed
        self.dtype = dtype
        self.device = device

    def has(self, parameter: Parameter) -> bool:
        return True

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        return parameter.shape

    def read(self, parameter: Parameter) -> torch.Tensor:
        out = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        if parameter.is_norm:
            return out.fill_(self.norm_value)
        generator = torch.Generator(self.device)
        generator.manual_seed(_mix(self.seed, parameter.name))
        return out.normal_(0.0, self.std, generator=generator)

    def release(self) -> None: ...

    def check_names(self, expected: Iterable[str], optional: Iterable[str]) -> None: ...


def _mix(seed: int, name: str) -> int:
    """A 63-bit seed from a seed and a name, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_tensors(
    config: PreTrainedConfig | Mapping[str, Any],
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that ``load_model(..., weights="random")`` uses, under their checkpoint names.

    They come one at a time, so that a large model can be filled or written without holding it
    twice. A tied head is left out.
    """
    config = read_config(config)
    spec = spec_from_hf(config)
    source = RandomWeights(spec, seed, dtype, torch.device(device))
    for parameter in checkpoint_parameters(spec, family_of(config).names):
        yield parameter.name, source.read(parameter)


def save_random_checkpoint(
    config: PreTrainedConfig | Mapping[str, Any],
    path: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_file_bytes: int = 4 << 30,
) -> Path:
    """Write the same random weights as a Hugging Face folder, for another engine to load.

    Parameters
    ----------
    path
        Folder to make; it must not exist. It appears whole or not at all.
    device
        Where the weights are drawn: the kind of device that the model under test runs on.
    max_file_bytes
        Weights are split over files of about this size.

    Raises
    ------
    WorkbenchError
        The folder exists already.
    """
    folder = Path(path)
    if folder.exists():
        raise WorkbenchError(f"{folder} exists already; remove it or choose another folder.")
    config = read_config(config)
    text = copy.deepcopy(config.get_text_config())
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        text.architectures = [family_of(config).architectures[0]]
        text.dtype = dtype
        text.save_pretrained(part)
        _write_tensors(part, random_tensors(config, seed, dtype, device), max_file_bytes)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_file_bytes: int
) -> None:
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held_bytes
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > max_file_bytes:
            flush()
        held[name] = tensor.cpu()
        held_bytes += size
        total += size
    flush()
    write_index(folder, weight_map, total)
