"""``quantize``: a model's checkpoint with its linear layers in 4 or 8 bits."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from workbench.bench.environment import collect_environment
from workbench.cli.nodes import build_node, compose_with_one
from workbench.cli.output import print_document, takes_json
from workbench.configuration import Composed, engine_config, limits_of
from workbench.core.errors import ConfigError
from workbench.models.families import read_config, spec_from_hf
from workbench.quality.corpus import read_text, tokenize
from workbench.slots.platform import DTYPES

#: Name of the record in the checkpoint's folder.
RECORD_FILE = "quantization.json"


def quantize_command(arguments: Sequence[str]) -> int:
    """Quantise and save a checkpoint; the exit status."""
    as_json, arguments = takes_json(list(arguments))
    command = "python -m workbench quantize " + shlex.join(arguments)
    composed, name = compose_with_one(
        "quantize", arguments, "quantizer", "quantizer", "+quantizing=checkpoint"
    )
    record, folder = quantize(composed, name, command)
    if as_json:
        print_document({"schema": 1, "folder": str(folder), **record})
        return 0
    errors = [layer["output_error"] for layer in record["layers"] if layer["output_error"]]
    mean = f"{sum(errors) / len(errors):.4f}" if errors else "not measured"
    print(
        f"checkpoint: {folder}\nrecord: {folder / RECORD_FILE}\n"
        f"{len(record['layers'])} layers in {record['scheme']}, mean relative error of their "
        f"outputs on the calibration text {mean}\n"
        f"left as they are: {', '.join(record['kept']) or 'none'}\n"
        f"serve it: python -m workbench model={folder} engine/linear={record['reader']}"
    )
    return 0


def quantize(composed: Composed, name: str, command: str) -> tuple[dict[str, Any], Path]:
    """Quantise the model of a composition; the record and the new folder."""
    began = time.monotonic()
    cfg = composed.cfg
    quantizer, program = build_node(cfg, "quantizer"), build_node(cfg, "quantizing")
    source = engine_config(composed, limits_of(cfg, max_num_seqs=1, max_model_len=1)).source
    folder = source.folder
    if cfg.weights != "checkpoint" or folder is None:
        raise ConfigError("quantize reads a checkpoint: weights=random has nothing to keep.")
    out = Path(
        cfg.out or f"results/local/models/{Path(source.name).name}-{name}-{program.scheme.name}"
    )
    if (out / "config.json").exists():
        raise ConfigError(f"{out} holds a model already: remove it, or choose another out=.")
    dtype = "bfloat16" if cfg.dtype == "auto" else str(cfg.dtype)
    platform = composed.choices["engine/platform"]
    device = torch.device("cpu" if platform == "cpu" else platform)
    context = spec_from_hf(read_config(source.config)).max_position_embeddings
    texts, about = _texts(cfg, source.tokenizer(), source.name, context)

    def progress(layer: Any, done: int, of: int) -> None:
        error = "" if layer.output_error is None else f", error {layer.output_error:.4f}"
        print(f"{done} of {of}: {layer.name}{error}", file=sys.stderr, flush=True)

    found = program.run(
        folder, out, quantizer, texts,
        dtype=DTYPES[dtype], device=device, seed=int(cfg.seed), progress=progress,
    )  # fmt: skip
    record = {
        "command": command,
        "model": source.name,
        "quantizer": name,
        "scheme": program.scheme.name,
        "reader": program.reader,
        "config": {
            node: OmegaConf.to_container(cfg[node], resolve=True)
            for node in ("quantizer", "quantizing")
        },
        "calibration": about,
        "kept": list(found.kept),
        "layers": [
            {"name": layer.name, "output_error": layer.output_error, "seconds": layer.seconds}
            for layer in found.report
        ],
        "seconds": time.monotonic() - began,
        "environment": collect_environment(str(device)).to_dict(),
    }
    (out / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record, out


def _texts(
    cfg: DictConfig, tokenizer: Any, model: str, context: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """Pieces of the calibration text as tokens, and what they are, for the record; none is longer
    than the model's context."""
    for key in ("num_texts", "text_tokens"):
        if not isinstance(cfg[key], int) or isinstance(cfg[key], bool) or cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]!r} must be a number of 1 or more.")
    if tokenizer is None:
        raise ConfigError(f"model {model} has no tokenizer, so no text can be read with it.")
    text = read_text(None if cfg.text is None else str(cfg.text))
    length = min(cfg.text_tokens, context)
    tokens = tokenize(text, tokenizer, cfg.num_texts * length).token_ids
    pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    about = {"text": text.name, "text_sha256": text.digest, "num_tokens": len(tokens)}
    return pieces, {**about, "num_texts": len(pieces)}
