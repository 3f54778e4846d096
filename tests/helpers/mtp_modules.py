"""Multi-token-prediction modules for tiny models: checkpoints that hold them, and what they draft,
in plain torch and by the tensors' published names."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.helpers.tiny_models import hf_model, tiny_model

#: By layout: prefix of the module, then names of the token's norm, the hidden state's, the
#: projection and the final norm.
PARTS = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
}
#: Family of the targets that tests have of each layout.
BASES = {"deepseek": "llama", "deepseek_qk_norm": "qwen3", "mimo": "qwen2"}
LAYERS, VOCAB_SIZE = 3, 12
#: Of modules that are right more often than others.
SEEDS = {"deepseek": 10, "deepseek_qk_norm": 7, "mimo": 0}


def layout_of(kind: str) -> str:
    return kind.partition("_")[0]


def prefix_of(kind: str, index: int = 0) -> str:
    return f"model.{'mtp_layers' if kind == 'mimo' else 'layers'}.{index}."


def base_model(kind: str) -> Path:
    """The target without a module, as Transformers reads it. Its vocabulary is so small that a
    random module is right now and then."""
    return tiny_model(BASES[kind], num_hidden_layers=LAYERS, vocab_size=VOCAB_SIZE)


def module_tensors(base: Path, kind: str, index: int, seed: int) -> dict[str, torch.Tensor]:
    """A module that fits a model's layers, so wide that its guesses depend on all that it reads."""
    weights = load_file(base / "model.safetensors")
    hidden = weights["model.norm.weight"].shape[0]
    token_norm, hidden_norm, projection, final_norm = PARTS[layout_of(kind)]
    shapes = {name: (hidden,) for name in (token_norm, hidden_norm, final_norm)}
    shapes[projection] = (hidden, 2 * hidden)
    own = {f"{name}.weight": shape for name, shape in shapes.items()}
    own |= {
        name.removeprefix("model.layers.0."): tuple(tensor.shape)
        for name, tensor in weights.items()
        if name.startswith("model.layers.0.")
    }
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in sorted(own.items()):
        drawn = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        found[name] = 1 + 0.5 * drawn if is_norm else drawn * (0.2 if len(shape) > 1 else 0.3)
    prefix = prefix_of(layout_of(kind), index)
    tensors = {prefix + name: tensor for name, tensor in found.items()}
    if layout_of(kind) == "deepseek":  # as published ones have, and nothing reads
        tensors[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        tensors[f"{prefix}shared_head.head.weight"] = head.clone()
    return tensors


@functools.cache
def mtp_model(kind: str, num_modules: int = 1) -> Path:
    """Folder of a target with modules, as such models are published."""
    base, first = base_model(kind), 0 if kind == "mimo" else LAYERS
    weights = load_file(base / "model.safetensors")
    for i in range(num_modules):
        weights |= module_tensors(base, kind, first + i, SEEDS[kind] + 100 * i)
    changes: dict[str, Any] = {"num_nextn_predict_layers": num_modules}
    if kind == "mimo":
        changes |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    return folder_with(base, weights, **changes)


@functools.cache
def mtp_module(model: Path) -> Path:
    """Folder of a DeepSeek-V3-like module for any tiny model, apart from it. It mostly guesses that
    the last token comes again, so is often right where a tiny model repeats itself."""
    folder = Path(tempfile.mkdtemp(prefix="module-", dir=model.parent))
    tensors = module_tensors(model, "deepseek", 0, seed=0)
    for name, tensor in tensors.items():
        part = name.removeprefix(prefix_of("deepseek"))
        if part in ("hnorm.weight", "shared_head.norm.weight"):
            tensor.fill_(1.0)
        elif part == "eh_proj.weight":  # the hidden state passes through it
            tensor.mul_(0.05)
            tensor[:, len(tensor) :] += torch.eye(len(tensor))
        elif part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensor.mul_(0.05)
    save_file(tensors, folder / "model.safetensors")
    return folder


def folder_with(base: Path, weights: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A copy of a model's folder with other weights and fields of its config."""
    folder = Path(tempfile.mkdtemp(prefix="mtp-", dir=base.parent))
    shutil.copytree(base, folder, dirs_exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Reference:
    """A module over whole sequences, one draft after another, each from the beginning."""

    def __init__(self, base: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
        self.target, self.kind = hf_model(base), layout_of(kind)
        marker = PARTS[self.kind][2] + ".weight"
        (prefix,) = (n.removesuffix(marker) for n in tensors if n.endswith("." + marker))
        self.own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.config = self.target.config

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return scaled * self.own[f"{name}.weight"]

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.own[f"{name}.weight"], self.own.get(f"{name}.bias"))

    def heads(self, x: torch.Tensor, part: str) -> torch.Tensor:
        """Queries or keys ``[heads, S, D]``, normed where the family does, and rotated."""
        dim = getattr(self.config, "head_dim", None)
        dim = dim or self.config.hidden_size // self.config.num_attention_heads
        y = self.product(x, f"self_attn.{part}_proj").view(len(x), -1, dim)
        if f"self_attn.{part}_norm.weight" in self.own:
            y = self.norm(y, f"self_attn.{part}_norm")
        if part != "v":
            angle = torch.arange(len(x))[:, None] / self.config.rope_parameters["rope_theta"] ** (
                torch.arange(0, dim, 2) / dim
            )
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            a, b = y.chunk(2, -1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return y.transpose(0, 1)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        """The decoder layer over a whole sequence ``[S, H]``."""
        normed = self.norm(x, "input_layernorm")
        q, k, v = (self.heads(normed, part) for part in "qkv")
        k, v = (y.repeat_interleave(len(q) // len(y), 0) for y in (k, v))
        scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self.product(seen.transpose(0, 1).flatten(1), "self_attn.o_proj")
        normed = self.norm(x, "post_attention_layernorm")
        gate, up = self.product(normed, "mlp.gate_proj"), self.product(normed, "mlp.up_proj")
        return x + self.product(F.silu(gate) * up, "mlp.down_proj")

    def target_states(self, ids: list[int]) -> torch.Tensor:
        """What the layout reads of the target, ``[S, H]``: after the final norm for DeepSeek's,
        before it for MiMo's."""
        states: dict[str, torch.Tensor] = {}
        hook = self.target.model.norm.register_forward_hook(
            lambda _, args, out: states.update(before=args[0][0], after=out[0])
        )
        self.target(torch.tensor([ids]))
        hook.remove()
        return states["after" if self.kind == "deepseek" else "before"]

    @torch.inference_mode()
    def step(self, hidden: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[V]`` behind the last pair of ``hidden[S, H]`` and the tokens ``ids[1..S]``, and
        the hidden state that the next pair gets, ``[1, H]``."""
        token_norm, hidden_norm, projection, final_norm = PARTS[self.kind]
        embeds = self.target.get_input_embeddings()(torch.tensor(ids[1 : len(hidden) + 1]))
        halves = [self.norm(embeds, token_norm), self.norm(hidden, hidden_norm)]
        if self.kind == "mimo":
            halves.reverse()
        out = self.layer(self.product(torch.cat(halves, -1), projection))[-1:]
        normed = self.norm(out, final_norm)
        logits: torch.Tensor = self.target.lm_head(normed)[0]
        return logits, normed if self.kind == "deepseek" else out

    @torch.inference_mode()
    def logits(self, known: list[int], drafts: list[int]) -> torch.Tensor:
        """Behind known tokens and drafts."""
        hidden = self.target_states(known[:-1])
        for place in range(len(drafts) + 1):
            logits, feature = self.step(hidden, [*known, *drafts[:place]])
            hidden = torch.cat([hidden, feature])
        return logits

    def chain(self, known: list[int], count: int) -> list[int]:
        """Its likeliest drafts after known tokens."""
        drafts: list[int] = []
        for _ in range(count):
            drafts.append(int(self.logits(known, drafts).argmax()))
        return drafts


def reference(kind: str) -> Reference:
    """Of the first module of :func:`mtp_model`."""
    base, first = base_model(kind), 0 if kind == "mimo" else LAYERS
    return Reference(base, module_tensors(base, kind, first, SEEDS[kind]), kind)
