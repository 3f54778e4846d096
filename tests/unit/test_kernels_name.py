"""Our ``kernels`` folder shares its name with a Hugging Face package: Transformers still works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

GENERATE = """
import sys
sys.path.insert(0, sys.argv[1])
import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available(), "Transformers takes our folder for the package"
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(ids.shape[1])
"""


def test_transformers_generates_with_our_folder_on_the_path() -> None:
    command = [sys.executable, "-c", GENERATE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"


def test_our_package_has_no_version_that_could_pass_for_the_other() -> None:
    import kernels

    assert not hasattr(kernels, "__version__")
