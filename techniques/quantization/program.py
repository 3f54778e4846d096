"""Quantises a model's checkpoint and writes it as a compressed-tensors one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from techniques.quantization.compressed_tensors import config_of, tensors_of
from techniques.quantization.quantizers import (
    PartialModel,
    PipelineOptions,
    PlainLinear,
    QuantizedModel,
    Quantizer,
    quantize_decoder,
)
from techniques.quantization.quantizers.pipeline import Progress
from techniques.quantization.scaled_formats import scaled_config, scaled_tensors
from techniques.quantization.weights import WeightScheme, parse_scheme
from workbench.models.checkpoint import Checkpoint, write_index
from workbench.models.families import family_of, read_config, spec_from_hf
from workbench.models.loader import load_model
from workbench.models.parameters import Parameter

_FILE_BYTES = 4 << 30
#: Files of a model's folder that are copied as they are.
_BESIDES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*",
            "generation_config.json", "added_tokens.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """Options of :class:`QuantizeProgram`.

    Attributes
    ----------
    scheme
        As :func:`parse_scheme` reads it.
    skip
        Patterns of checkpoint names that stay as they are, separated by commas; the output layer
        does so anyway.
    batch_tokens, num_rows
        As of :class:`PipelineOptions`.
    """

    scheme: str = "w4g64z"
    skip: str = ""
    batch_tokens: int = 4096
    num_rows: int = 512


class QuantizeProgram:
    """Runs a quantiser over a checkpoint."""

    Options = ProgramOptions

    def __init__(self, options: ProgramOptions) -> None:
        self.options = options
        self.scheme = parse_scheme(options.scheme)

    @property
    def reader(self) -> str:
        """Option of slot ``linear`` that reads what is written."""
        return "packed_checkpoint" if self.scheme.input_codes() is None else "scaled_checkpoint"

    def run(
        self,
        folder: Path,
        out: Path,
        quantizer: Quantizer,
        texts: Sequence[Sequence[int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        progress: Progress | None = None,
    ) -> QuantizedModel:
        """Quantise the model in ``folder`` and write the checkpoint ``out``, scales and other
        tensors in ``dtype``. Decoder layers that an interrupted run of the same options has left
        in ``out`` are taken from there."""
        options = self.options
        partial = PartialModel(
            out, self.scheme, self._identity(folder, quantizer, texts, seed, device)
        )
        skip = tuple(filter(None, (part.strip() for part in options.skip.split(","))))
        decoder = load_model(folder, linear=PlainLinear(), dtype=torch.float32, device=device)
        found = quantize_decoder(
            decoder,
            quantizer,
            self.scheme,
            texts,
            PipelineOptions(skip, False, options.batch_tokens, options.num_rows, seed),
            progress,
            partial,
        )
        del decoder
        self._write(folder, out, found, dtype)
        partial.remove()
        return found

    def _identity(
        self,
        folder: Path,
        quantizer: Quantizer,
        texts: Sequence[Sequence[int]],
        seed: int,
        device: torch.device,
    ) -> dict[str, Any]:
        """What the codes depend on."""
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        files = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        return {
            "model": [config, files],
            "quantizer": [type(quantizer).__name__, dataclasses.asdict(quantizer.options)],
            "scheme": self.scheme.name,
            "options": dataclasses.asdict(self.options),
            "texts": hashlib.sha256(json.dumps([list(t) for t in texts]).encode()).hexdigest(),
            "seed": seed,
            "device": device.type,
        }

    def _write(self, folder: Path, out: Path, found: QuantizedModel, dtype: torch.dtype) -> None:
        out.mkdir(parents=True, exist_ok=True)
        files: list[dict[str, torch.Tensor]] = [{}]
        size = total = 0
        for name, tensor in self._tensors(folder, found, dtype):
            if size + tensor.nbytes > _FILE_BYTES and files[-1]:
                files.append({})
                size = 0
            files[-1][name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(files, 1):
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
            name = "model.safetensors" if len(files) == 1 else name
            save_file(tensors, out / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            write_index(out, weight_map, total)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Readers know a head that is the embedding by its own name; config.json need not say so.
        model = read_config(folder)
        embedding = family_of(model).names.embedding
        tied = spec_from_hf(model).tie_word_embeddings
        kept = ["lm_head" if tied and name == embedding else name for name in found.kept]
        if isinstance(self.scheme, WeightScheme) and not self.scheme.rounds_inputs:
            config["quantization_config"] = config_of(self.scheme, kept)
        else:
            config["quantization_config"] = scaled_config(self.scheme, kept)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for pattern in _BESIDES:
            for file in folder.glob(pattern):
                shutil.copy2(file, out / file.name)

    def _tensors(
        self, folder: Path, found: QuantizedModel, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the new checkpoint, by the names that the old one has."""
        checkpoint = Checkpoint(folder, family_of(read_config(folder)))
        left = set(found.weights) | set(found.changed)
        for name in sorted(checkpoint.names):
            layer, stored = name.removesuffix(".weight"), checkpoint.stored_name(name)
            if name in found.changed:
                left.discard(name)
                yield stored, found.changed[name].to(dtype).contiguous()
            elif name != layer and layer in found.weights:
                left.discard(layer)
                weight = found.weights[layer]
                stem = stored.removesuffix(".weight")
                if weight.scheme.input_codes() is None:
                    yield from tensors_of(stem, weight, dtype).items()
                else:
                    yield from scaled_tensors(stem, weight).items()
            else:
                tensor = checkpoint.read(Parameter(name, ()))
                is_float = tensor.is_floating_point()
                yield stored, tensor.to(dtype).contiguous() if is_float else tensor
        checkpoint.release()
        assert not left, f"nothing was written for {sorted(left)}"
