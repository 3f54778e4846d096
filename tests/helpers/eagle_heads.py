"""Random draft heads for tiny models, saved as published ones are."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from techniques.draft_heads import EagleModule, Target, save_head
from techniques.eagle.drafter import random_spec
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.slots.linear import DenseLinear


@functools.cache
def loaded(model: Path) -> Decoder:
    """A model in fp32 on the CPU."""
    return load_model(model, linear=DenseLinear(), dtype=torch.float32, device="cpu")


@functools.cache
def eagle_module(model: Path, kind: str, draft_vocab_size: int = 0, seed: int = 0) -> EagleModule:
    """A random head; with a reduced vocabulary, of every other id first."""
    target = Target(loaded(model))
    spec = random_spec(target.spec, kind, draft_vocab_size)
    d2t = None
    if spec.has_reduced_vocab:
        ids = torch.arange(spec.vocab_size).roll(-3)[: spec.draft_vocab_size].sort().values
        d2t = ids - torch.arange(spec.draft_vocab_size)
    torch.manual_seed(seed)
    module = EagleModule(spec, target.embedding(), target.lm_head(), d2t)
    with torch.no_grad():  # wide enough that what it guesses depends on all that it reads
        for name, parameter in module.named_parameters():
            if name != "lm_head.weight":
                parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.5).add_(
                    parameter.dim() == 1
                )
    return module


@functools.cache
def eagle_head(model: Path, kind: str = "eagle3", draft_vocab_size: int = 0, seed: int = 0) -> Path:
    """Folder of such a head."""
    module = eagle_module(model, kind, draft_vocab_size, seed)
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    return save_head(folder, module.spec, module.state_dict(), torch.float32)
