"""One Hugging Face model in memory, shared by every baseline that measures it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from workbench.baselines.intake import RequestLimits
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.memory import MemoryProbe

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WEIGHTS = ("checkpoint", "random")


@dataclass(slots=True, eq=False)
class SharedModel:
    """A loaded model and what the baselines need to know of it.

    Attributes
    ----------
    eos_token_ids
        End-of-sequence ids of the checkpoint's generation config, else of its model config.
    pad_token_id
        An id to pad prompts with; the attention mask hides it.
    base_bytes
        What the process held before the model existed.
    model_bytes
        What loading it added.
    """

    key: tuple[Any, ...]
    model: Any
    limits: RequestLimits
    eos_token_ids: frozenset[int]
    pad_token_id: int
    dtype: str
    device: torch.device
    weights: str
    seed: int
    base_bytes: int
    model_bytes: int
    num_users: int = 0
    probe: MemoryProbe = field(default_factory=lambda: MemoryProbe("cpu"))

    @property
    def attention(self) -> str:
        """The attention implementation that the model runs now."""
        return str(self.model.config._attn_implementation)

    def use_attention(self, implementation: str) -> None:
        """Switch the attention implementation; a no-op where it is in use already."""
        if self.attention != implementation:
            self.model.set_attn_implementation(implementation)


_loaded: dict[tuple[Any, ...], SharedModel] = {}
_lock = threading.Lock()


def versions() -> str:
    """Return the versions of transformers and torch, as one string."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def acquire(
    model_path: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    weights: str = "checkpoint",
    seed: int = 0,
) -> SharedModel:
    """Load a model, or take the one that is loaded already; pair with :func:`release`.

    Parameters
    ----------
    model_path
        A folder with ``config.json``, and safetensors weights unless ``weights`` is ``random``.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    weights
        ``checkpoint`` reads the folder; ``random`` draws the shape's weights on the device.
    seed
        Seed of random weights.

    Raises
    ------
    ConfigError
        An unknown dtype or kind of weights, or a folder that cannot be loaded.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if weights not in WEIGHTS:
        raise unknown_name("kind of weights", weights, WEIGHTS)
    folder = Path(model_path).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a Hugging Face model folder: it has no config.json. "
            "Give the folder that a fetch made, or one saved with save_pretrained."
        )
    where = torch.device(device)
    key = (str(folder), dtype, str(where), weights, seed if weights == "random" else None)
    with _lock:
        shared = _loaded.get(key)
        if shared is None:
            shared = _load(key, folder, dtype, where, weights, seed)
            _loaded[key] = shared
        shared.num_users += 1
        return shared


def release(shared: SharedModel) -> None:
    """Give one use back; the last one frees the model and its memory."""
    with _lock:
        assert shared.num_users > 0, "a model was released more often than it was acquired"
        shared.num_users -= 1
        if shared.num_users == 0:
            del _loaded[shared.key]
            shared.model = None
            shared.probe.trim()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back progress bars and warnings of transformers; errors still show."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _load(
    key: tuple[Any, ...],
    folder: Path,
    dtype: str,
    device: torch.device,
    weights: str,
    seed: int,
) -> SharedModel:
    probe = MemoryProbe(device)
    probe.trim()
    base_bytes = probe.current_bytes()
    with quiet_transformers():
        try:
            model = (
                _read_checkpoint(folder, DTYPES[dtype], device)
                if weights == "checkpoint"
                else _draw_random(folder, DTYPES[dtype], device, seed)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # readers of weights have error classes of their own
            raise ConfigError(f"the model in {folder} could not be loaded: {error}") from error
    model.eval()
    _touch(model)
    probe.trim()
    eos_token_ids, pad_token_id = _special_ids(model)
    # A checkpoint's own sampling defaults (temperature, repetition penalty) would be merged into
    # every call of generate: greedy has to be a plain argmax.
    model.generation_config = GenerationConfig()
    return SharedModel(
        key=key,
        model=model,
        limits=_limits(model),
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        dtype=dtype,
        device=device,
        weights=weights,
        seed=seed,
        base_bytes=base_bytes,
        model_bytes=max(0, probe.current_bytes() - base_bytes),
        probe=probe,
    )


def _read_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device)


def _draw_random(folder: Path, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def _touch(model: Any) -> None:
    """Read one byte of every page of the weights.

    A checkpoint is mapped from its file, and a page counts as resident only once it was read:
    without this the weights would seem to appear in the first run.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            tensor.detach().view(-1).view(torch.uint8)[::4096].sum()


def _limits(model: Any) -> RequestLimits:
    text_config = model.config.get_text_config(decoder=True)
    return RequestLimits(
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        max_model_len=int(text_config.max_position_embeddings),
    )


def _special_ids(model: Any) -> tuple[frozenset[int], int]:
    text_config = model.config.get_text_config(decoder=True)
    generation = model.generation_config
    eos = generation.eos_token_id
    if eos is None:
        eos = text_config.eos_token_id
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    eos_token_ids = frozenset(int(i) for i in ids)
    pad = generation.pad_token_id
    if pad is None or not 0 <= pad < model.get_input_embeddings().num_embeddings:
        pad = min(eos_token_ids, default=0)
    return eos_token_ids, int(pad)
