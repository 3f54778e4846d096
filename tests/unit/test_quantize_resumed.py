"""``quantize`` after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from techniques.quantization.program import ProgramOptions, QuantizeProgram
from techniques.quantization.quantizers import (
    AWQ,
    FP8,
    GPTQ,
    AutoRound,
    AutoRoundOptions,
    GPTQOptions,
    Quantizer,
    SmoothQuant,
)
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError, WorkbenchError

TEXTS = [list(range(4, 40)), list(range(90, 60, -1)), list(range(10, 90, 3))]


class Interrupted(Exception):
    """As if the process had been stopped."""


def quantized(
    out: Path, quantizer: Quantizer, scheme: str, stop_after: int | None = None, **options: Any
) -> list[str]:
    """Names of the layers that progress was reported of, in order."""
    seen: list[str] = []

    def progress(entry: Any, done: int, of: int) -> None:
        assert done <= of
        seen.append(entry.name)
        if len(seen) == stop_after:
            raise Interrupted

    folder = tiny_model("llama_biases", num_key_value_heads=4, num_hidden_layers=3)
    QuantizeProgram(ProgramOptions(scheme, **options)).run(
        folder, out, quantizer, TEXTS, dtype=torch.float32, device=torch.device("cpu"), seed=0,
        progress=progress,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        (AWQ(), "w4g32z"),
        (GPTQ(GPTQOptions(act_order=True, static_groups=True)), "w4g32"),
        (AutoRound(AutoRoundOptions(iterations=3)), "w4g32z"),
        (SmoothQuant(), "w8a8"),
        (FP8(), "fp8_static"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__.lower(),
)
def test_the_checkpoint_is_that_of_a_run_in_one_go(
    quantizer: Quantizer, scheme: str, tmp_path: Path
) -> None:
    quantized(tmp_path / "whole", quantizer, scheme)
    out = tmp_path / "resumed"
    with pytest.raises(Interrupted):
        quantized(out, quantizer, scheme, stop_after=17)  # in the third of three layers of seven
    assert not (out / "config.json").exists()
    assert len(list((out / "partial").glob("layer-*.safetensors"))) == 2
    again = quantized(out, quantizer, scheme)
    assert len(again) == 7 and all(".2." in name for name in again)
    assert not (out / "partial").exists()
    wanted, found = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", out))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


def test_another_run_is_told_what_differs(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        quantized(tmp_path, GPTQ(), "w4g32", stop_after=8)
    with pytest.raises(ConfigError, match=r"interrupted run with another scheme, options\. Repeat"):
        quantized(tmp_path, GPTQ(), "w4g32z")
    with pytest.raises(ConfigError, match=r"with another quantizer\. Repeat"):
        quantized(tmp_path, GPTQ(GPTQOptions(damp=0.5)), "w4g32")
    file = tmp_path / "partial" / "layer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WorkbenchError, match=r"layer-00000.safetensors cannot be read"):
        quantized(tmp_path, GPTQ(), "w4g32")
