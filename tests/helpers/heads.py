"""Draft heads for tiny models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from techniques.draft_heads import HeadSpec, MedusaHead, Target, save_head
from techniques.draft_heads.files import with_target
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.slots.linear import DenseLinear


@functools.cache
def tiny_target(model: Path) -> Target:
    """A tiny model in fp32, as heads see it."""
    decoder: Decoder = load_model(model, linear=DenseLinear(), dtype=torch.float32, device="cpu")
    return Target(decoder)


@functools.cache
def untrained_heads(model: Path) -> Path:
    """Folder of Medusa heads that guess that the next token comes again, so often right where a
    tiny model repeats itself."""
    target = tiny_target(model)
    spec = HeadSpec(
        kind="medusa",
        hidden_size=target.spec.hidden_size,
        vocab_size=target.spec.vocab_size,
        draft_vocab_size=target.spec.vocab_size,
        num_heads=3,
    )
    heads = MedusaHead(spec, target.lm_head())
    folder = Path(tempfile.mkdtemp(prefix="heads-", dir=model.parent))
    spec = with_target(spec, str(model), target)
    return save_head(folder, spec, heads.state_dict(), torch.float32)
