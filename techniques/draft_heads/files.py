"""Folders of draft heads: ``config.json`` and weights in the published layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from techniques.draft_heads.spec import HeadSpec
from techniques.draft_heads.target import Target
from workbench.core.errors import WorkbenchError
from workbench.models.spec import ModelSpec

HEAD_FILE = "model.safetensors"
#: Where published heads have their weights.
_WEIGHT_FILES = (HEAD_FILE, "medusa_lm_head.safetensors", "medusa_lm_head.pt", "pytorch_model.bin")
#: Tensors of the target that published heads repeat.
_TARGETS_OWN = ("embed_tokens.weight",)


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A head as its folder has it: weights under their published names, on the host."""

    spec: HeadSpec
    state: dict[str, torch.Tensor]
    folder: Path

    @property
    def d2t(self) -> torch.Tensor | None:
        """The map of a reduced vocabulary, ``[draft_vocab]`` int64."""
        return self.state.get("d2t") if self.spec.has_reduced_vocab else None


def load_head(folder: Path | str, target: ModelSpec | None = None) -> LoadedHead:
    """Read a head.

    Parameters
    ----------
    target
        What it is to serve, so that a head for another shape is refused.

    Raises
    ------
    WorkbenchError
        A file is missing or broken; the layout is not known; tensors are missing, unexpected or of
        another shape; the head is for another width or vocabulary.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        spec = HeadSpec.from_config(config, target.num_layers if target else 0)
    except WorkbenchError as error:
        raise type(error)(f"{folder}: {error}") from error
    if target is not None:
        _check_shape(spec, target, folder)
    state = _read_weights(folder)
    _check_tensors(spec, state, folder)
    return LoadedHead(spec, {k: v for k, v in state.items() if k not in _TARGETS_OWN}, folder)


def save_head(
    folder: Path | str, spec: HeadSpec, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Path:
    """Write a head in its published layout; floating-point tensors in ``dtype``."""
    folder = Path(folder)
    kept = {
        name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach())
        .cpu()
        .contiguous()
        .clone()
        for name, tensor in state.items()
    }
    _check_tensors(spec, kept, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**spec.to_config(), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(kept, folder / HEAD_FILE, metadata={"format": "pt"})
    return folder


def check_target(head: LoadedHead, target: Target) -> None:
    """Refuse a head that says it was trained for another model of the same shape.

    Raises
    ------
    WorkbenchError
        Names both.
    """
    trained_for = head.spec.trained_for
    own = target.fingerprint()
    if trained_for and trained_for.get("fingerprint") != own:
        raise WorkbenchError(
            f"the head in {head.folder} was trained for {trained_for.get('name')!r} (fingerprint "
            f"{trained_for.get('fingerprint')}), not for this model (fingerprint {own}). Train one "
            "for it, or name the model that it was trained for."
        )


def with_target(spec: HeadSpec, name: str, target: Target) -> HeadSpec:
    """The spec, saying what it was trained for."""
    return dataclasses.replace(
        spec, trained_for={"name": name, "fingerprint": target.fingerprint()}
    )


def head_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a head, under its published name."""
    if spec.kind == "medusa":
        return _medusa_shapes(spec)
    layer, hidden, third = spec.layer, spec.hidden_size, spec.kind == "eagle3"
    width = 2 * hidden if third else hidden
    prefix = "midlayer." if third else "layers.0."
    q, kv, inner = layer.layers[0].q_size, layer.layers[0].kv_size, layer.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, (3 if third else 2) * hidden)}
    if spec.fc_bias:
        shapes["fc.bias"] = (hidden,)
    for part, rows, columns, has_bias in (
        ("self_attn.q_proj", q, width, layer.qkv_bias),
        ("self_attn.k_proj", kv, width, layer.qkv_bias),
        ("self_attn.v_proj", kv, width, layer.qkv_bias),
        ("self_attn.o_proj", hidden, q, layer.o_bias),
        ("mlp.gate_proj", inner, hidden, layer.mlp_bias),
        ("mlp.up_proj", inner, hidden, layer.mlp_bias),
        ("mlp.down_proj", hidden, inner, layer.mlp_bias),
    ):
        shapes[f"{prefix}{part}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{prefix}{part}.bias"] = (rows,)
    shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    if third:
        shapes |= {f"{prefix}{n}.weight": (hidden,) for n in ("input_layernorm", "hidden_norm")}
        shapes |= {"norm.weight": (hidden,), "lm_head.weight": (spec.draft_vocab_size, hidden)}
        shapes |= {"d2t": (spec.draft_vocab_size,), "t2d": (spec.vocab_size,)}
    return shapes


def _medusa_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(spec.num_heads):
        for layer in range(spec.num_layers):
            shapes[f"{head}.{layer}.linear.weight"] = (hidden, hidden)
            shapes[f"{head}.{layer}.linear.bias"] = (hidden,)
        if not spec.shares_lm_head:
            shapes[f"{head}.{spec.num_layers}.weight"] = (spec.draft_vocab_size, hidden)
    return shapes | ({"d2t": (spec.draft_vocab_size,)} if spec.has_reduced_vocab else {})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkbenchError(
            f"{path} cannot be read ({error.strerror}). A head is a folder with config.json and "
            f"one of {', '.join(_WEIGHT_FILES)}."
        ) from error
    except ValueError as error:
        raise WorkbenchError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WorkbenchError(f"{path} holds no JSON object.")
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = next((folder / name for name in _WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise WorkbenchError(f"{folder} has no weights: none of {', '.join(_WEIGHT_FILES)}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise WorkbenchError(f"{path} is truncated or no file of weights: {error}") from error


def _check_shape(spec: HeadSpec, target: ModelSpec, folder: Path) -> None:
    for what, own, wanted in (
        ("hidden size", spec.hidden_size, target.hidden_size),
        ("vocabulary", spec.vocab_size, target.vocab_size),
    ):
        if own != wanted:
            raise WorkbenchError(
                f"the head in {folder} is for a {what} of {own}, and the target has {wanted}: it "
                "was trained for another model. Train one for this target."
            )
    beyond = [i for i in spec.aux_layers if not 0 <= i <= target.num_layers]
    if beyond or (spec.kind == "eagle3" and len(spec.aux_layers) != 3):
        raise WorkbenchError(
            f"the head in {folder} reads the hidden states of layers {list(spec.aux_layers)}; "
            f"valid are three from 0 to {target.num_layers}, the target's number of layers."
        )


def _check_tensors(spec: HeadSpec, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    expected = head_shapes(spec)
    optional = () if spec.has_reduced_vocab else ("d2t", "t2d")
    missing = sorted(expected.keys() - state.keys() - set(optional))
    unexpected = sorted(state.keys() - expected.keys() - set(_TARGETS_OWN))
    wrong = [
        f"{name} has {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or wrong:
        raise WorkbenchError(
            f"the weights in {folder} are not those of a head of kind {spec.kind} as its "
            "config.json has it."
            + (f" Missing: {', '.join(missing)}." if missing else "")
            + (f" Unexpected: {', '.join(unexpected)}." if unexpected else "")
            + (f" Wrong shapes: {'; '.join(wrong)}." if wrong else "")
        )
    if "d2t" in state:
        ids = state["d2t"].long() + torch.arange(spec.draft_vocab_size)
        if ids.min() < 0 or ids.max() >= spec.vocab_size or len(set(ids.tolist())) != len(ids):
            raise WorkbenchError(
                f"the map d2t in {folder} does not give {spec.draft_vocab_size} different ids from "
                f"0 to {spec.vocab_size - 1}."
            )
