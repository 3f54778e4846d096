"""GGUF files: what the header says, exact weights, config and tokenizer; and bad files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.gguf_files import VOCAB_SIZE, round_norms, write_gguf
from tests.helpers.tiny_models import tiny_model
from workbench.models.store import BrokenModelError, UnsupportedModelError
from workbench.models.store.gguf_config import SUPPORTED_ARCHITECTURES, llama3_rope_factors
from workbench.models.store.gguf_convert import convert_gguf, converted_bytes
from workbench.models.store.gguf_file import GgufFile
from workbench.models.store.gguf_tensors import unpermute_rope
from workbench.models.store.gguf_tokenizer import build_tokenizer, sentencepiece_merges
from workbench.models.store.integrity import INDEX_NAME, open_model_folder

#: What the file cannot state: the Gemma 3 constants that llama.cpp too has built in.
GEMMA3 = {
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    },
    "final_logit_softcapping": None,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama_tied": ("llama_tied", "llama", {}),
    "llama_biases": ("llama_biases", "llama", {}),
    "llama_head_dim": ("llama_head_dim", "llama", {}),
    "llama_linear_rope": ("llama_linear_rope", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    # Transformers' GGUF path knows no other head size for Qwen3.
    "qwen3_head_dim_128": ("qwen3", "qwen3", {"head_dim": 128}),
    "gemma3": ("gemma3", "gemma3", GEMMA3),
}
TEXTS = [
    "",
    "the cafe",
    "  the  12 34",
    "a  12",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f642 e\u0301",
    "def f(x):\n    return x + 12  # the\n\n",
    "<|im_start|>the<|im_end|><think>1",
    "they'll the the\tT\r\n",
]


def tiny_folder(case: str, tmp_path: Path) -> Path:
    family, _, overrides = CASES[case]
    shared = tiny_model(family, vocab_size=VOCAB_SIZE, **overrides)
    return round_norms(shutil.copytree(shared, tmp_path / f"hf-{case}"))


def tiny_gguf(case: str, tmp_path: Path, **options: Any) -> Path:
    folder = tiny_folder(case, tmp_path)
    return write_gguf(tmp_path / f"{case}.gguf", folder, CASES[case][1], **options)


def convert(path: Path, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "converted"
    out.mkdir()
    convert_gguf(path, out, **options)
    return out


def transformers_gguf(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path, ggml_type="Q4_1", metadata={"llama.extra": 1.5})
    ours, reference = GgufFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(mine.shape)
        assert np.array_equal(ours.dequantize(tensor.name).numpy(), expected)


@pytest.mark.parametrize("case", CASES)
def test_fp32_round_trip_gives_the_same_model(case: str, tmp_path: Path) -> None:
    path = tiny_gguf(case, tmp_path)
    original = load(tmp_path / f"hf-{case}")
    converted = load(convert(path, tmp_path, dtype="float32"))
    assert type(converted) is type(original)
    weights = converted.state_dict()
    assert set(weights) == set(original.state_dict())
    for name, values in original.state_dict().items():
        assert torch.equal(weights[name], values), name
    ids = torch.arange(VOCAB_SIZE - 40, VOCAB_SIZE)[None]
    with torch.inference_mode():
        assert torch.equal(converted(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("case", "ggml_type"),
    [("llama", t) for t in ("Q4_1", "Q8_0", "Q5_0", "F16", "BF16")]
    + [(case, "Q4_1") for case in ("qwen2", "qwen3_head_dim_128", "gemma3")],
)
def test_dequantised_weights_are_those_of_transformers(
    case: str, ggml_type: str, tmp_path: Path
) -> None:
    path = tiny_gguf(case, tmp_path, ggml_type=ggml_type)
    ours = load(convert(path, tmp_path, dtype="float32")).state_dict()
    theirs = transformers_gguf(path).state_dict()
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert torch.equal(ours[name], values.float()), name


def test_bf16_storage_rounds_and_nothing_else(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path, ggml_type="Q4_1")
    stored = load_file(convert(path, tmp_path) / "model.safetensors")
    exact_folder = tmp_path / "exact"
    exact_folder.mkdir()
    convert_gguf(path, exact_folder, dtype="float32")
    exact = load_file(exact_folder / "model.safetensors")
    assert stored and all(values.dtype == torch.bfloat16 for values in stored.values())
    for name, values in exact.items():
        assert torch.equal(stored[name], values.to(torch.bfloat16)), name
    total = sum(values.nbytes for values in stored.values())
    assert converted_bytes(path) == total


def test_report_says_what_was_converted(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path, ggml_type="Q4_1")
    done: list[int] = []
    out = tmp_path / "out"
    out.mkdir()
    report = convert_gguf(path, out, on_bytes=done.append)
    file = GgufFile(path)
    assert report["architecture"] == "llama"
    assert sum(report["quantization"].values()) == len(file.tensors)
    assert set(report["quantization"]) == {"Q4_1", "F32"}
    assert sum(done) == sum(tensor.num_bytes for tensor in file.tensors.values())


def test_config_is_exact_where_the_file_rounds(tmp_path: Path) -> None:
    config = json.loads(
        (convert(tiny_gguf("llama", tmp_path), tmp_path) / "config.json").read_text()
    )
    original = json.loads((tmp_path / "hf-llama" / "config.json").read_text())
    stored = GgufFile(tmp_path / "llama.gguf").arch_get("attention.layer_norm_rms_epsilon")
    assert config["rms_norm_eps"] == original["rms_norm_eps"] != stored


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: Path) -> None:
    theta, factor = 500_000.0, 32.0
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = tiny_model("llama", vocab_size=VOCAB_SIZE, head_dim=32, rope_parameters=rope)
    original = load(folder)
    base = 1.0 / theta ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    factors = (base / original.model.rotary_emb.inv_freq).float().numpy()
    assert factors.min() < factors.max() == pytest.approx(factor)
    np.testing.assert_allclose(llama3_rope_factors(theta, 32, factor), factors, rtol=1e-5)

    extra = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "l3.gguf", folder, "llama", pre="llama-bpe", extra_tensors=extra)
    converted = load(convert(path, tmp_path, dtype="float32"))
    assert torch.equal(converted.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)

    extra = {"rope_freqs.weight": factors * np.linspace(1, 1.1, 16, dtype=np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", folder, "llama", extra_tensors=extra)
    with pytest.raises(UnsupportedModelError, match="RoPE factors"):
        convert_gguf(path, tmp_path)


def test_gemma3_keys_that_newer_files_state(tmp_path: Path) -> None:
    metadata = {
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base_swa": 123.0,
        "gemma3.final_logit_softcapping": 20.0,
    }
    path = tiny_gguf("gemma3", tmp_path, metadata=metadata)
    config = json.loads((convert(path, tmp_path) / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 123.0
    assert config["final_logit_softcapping"] == 20.0


def test_weights_are_split_into_shards(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path)
    whole = load_file(convert(path, tmp_path) / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    convert_gguf(path, sharded, max_shard_bytes=sum(v.nbytes for v in whole.values()) // 3)
    folder = open_model_folder(sharded)
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert len(folder.weight_files) > 2
    assert set(index["weight_map"]) == set(whole)
    for name, filename in index["weight_map"].items():
        assert torch.equal(load_file(sharded / filename)[name], whole[name])


def test_end_of_turn_ends_a_generation_too(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path, metadata={"tokenizer.ggml.eot_token_id": 1})
    out = convert(path, tmp_path)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 1]


def test_unpermute_undoes_the_pairing_of_rotary_rows() -> None:
    # One head of four rows: llama.cpp's order 0, 2, 1, 3 holds HF's rows 0, 1, 2, 3.
    stored = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert unpermute_rope(stored, 1).squeeze(1).tolist() == [0, 1, 2, 3]
    assert unpermute_rope(stored.squeeze(1), 1).tolist() == [0, 1, 2, 3]
    with pytest.raises(BrokenModelError, match="rotary heads"):
        unpermute_rope(stored, 3)


@pytest.mark.parametrize(
    ("tokenizer", "pre"), [("gpt2", "qwen2"), ("gpt2", "llama-bpe"), ("gpt2", "gpt-2")]
)
def test_byte_level_ids_are_those_of_transformers(tokenizer: str, pre: str, tmp_path: Path) -> None:
    _assert_ids_equal(tiny_gguf("llama", tmp_path, tokenizer=tokenizer, pre=pre), tmp_path)


def test_sentencepiece_ids_are_those_of_transformers(tmp_path: Path) -> None:
    _assert_ids_equal(tiny_gguf("llama", tmp_path, tokenizer="llama", pre="default"), tmp_path)


def test_sentencepiece_merges_are_ranked_by_token_then_by_the_longer_left_part() -> None:
    vocab = {"a": 0, "aa": 1, "aaa": 2, "b": 3, "ab": 4}
    ab, aa = [("a", "b")], [("a", "a")]
    aaa = [("aa", "a"), ("a", "aa")]
    assert sentencepiece_merges(vocab, None) == [*aa, *aaa, *ab]
    assert sentencepiece_merges(vocab, [0.0, -3.0, -2.0, 0.0, -1.0]) == [*ab, *aaa, *aa]


def _assert_ids_equal(path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(convert(path, tmp_path))
    # Composed: `qwen2` text is put into form C, which that path leaves out.
    texts = [text.replace("e\u0301", "\u00e9") for text in TEXTS]
    assert [ours(t).input_ids for t in texts] == [theirs(t).input_ids for t in texts]
    assert len({tuple(ours(t).input_ids) for t in texts}) == len(texts)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_text_survives_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(GgufFile(tiny_gguf("llama", tmp_path, pre="smollm")))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm_splits_digits_before_anything_else(tmp_path: Path) -> None:
    """As the published tokenizer does; Transformers' GGUF path splits as GPT-2 there."""
    path = tiny_gguf("llama", tmp_path, pre="smollm")
    smollm = build_tokenizer(GgufFile(path))
    assert smollm.encode("12").tokens == ["1", "2"]
    assert smollm.encode("a  12").tokens == ["a", "\u0120\u0120", "1", "2"]
    gpt2 = build_tokenizer(GgufFile(tiny_gguf("llama_tied", tmp_path, pre="gpt-2")))
    assert gpt2.encode("12").tokens == ["12"]


def test_special_tokens_are_whole_and_marked(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert(tiny_gguf("llama", tmp_path), tmp_path))
    ids = tokenizer("<|im_start|>a<think>").input_ids
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"
    chat: Any = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)
    assert list(chat["input_ids"]) == ids[:2]


def test_bos_is_added_where_the_file_asks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tiny_gguf("llama", tmp_path, tokenizer="llama", pre="default")
    tokenizer = AutoTokenizer.from_pretrained(convert(path, tmp_path))
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("the", "the").input_ids.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metadata": {"llama.expert_count": 8}}, UnsupportedModelError, ["8 experts"]),
        ({"pre": "martian"}, UnsupportedModelError, ["martian", "smollm", "qwen2"]),
        ({"drop": ["output_norm.weight"]}, BrokenModelError, ["output_norm.weight", "missing"]),
        ({"drop": ["blk.1.attn_k.weight"]}, BrokenModelError, ["blk.1.attn_k.weight"]),
        ({"drop": ["token_embd.weight"]}, BrokenModelError, ["token_embd.weight"]),
        (
            {"extra_tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
            UnsupportedModelError,
            ["blk.0.attn_sinks.weight"],
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}},
            UnsupportedModelError,
            ["'su'", "yarn"],
        ),
    ],
)
def test_what_cannot_be_converted_is_named(
    options: dict[str, Any], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    path = tiny_gguf("llama", tmp_path, **options)
    with pytest.raises(error) as caught:
        convert(path, tmp_path)
    assert isinstance(caught.value, ValueError)
    for word in [*words, str(path)]:
        assert word in str(caught.value)
    assert not list((tmp_path / "converted").glob("*.safetensors"))


def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba'") as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path)
    assert all(name in str(caught.value) for name in SUPPORTED_ARCHITECTURES)


def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    whole = tiny_gguf("llama", tmp_path, ggml_type="Q4_1").read_bytes()
    header_end = GgufFile(tmp_path / "llama.gguf").tensors["token_embd.weight"].offset
    for length in (5, 30, 200, header_end // 2, header_end - 1, header_end + 9, len(whole) - 64):
        cut = tmp_path / f"cut-{length}.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(BrokenModelError, match="truncated") as caught:
            GgufFile(cut)
        assert str(cut) in str(caught.value)


def test_files_that_are_not_gguf(tmp_path: Path) -> None:
    for name, content in (("empty.gguf", b""), ("zip.gguf", b"PK\x03\x04" + b"\0" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenModelError, match="not a GGUF file"):
            GgufFile(tmp_path / name)
    with pytest.raises(BrokenModelError, match="no such file"):
        GgufFile(tmp_path / "absent.gguf")
    (tmp_path / "v9.gguf").write_bytes(b"GGUF\x09\0\0\0" + b"\0" * 16)
    with pytest.raises(UnsupportedModelError, match="version 9"):
        GgufFile(tmp_path / "v9.gguf")


def test_storage_dtype_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        convert_gguf(tmp_path / "any.gguf", tmp_path, dtype="int3")
