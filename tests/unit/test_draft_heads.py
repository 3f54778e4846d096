"""Draft heads: published layouts and what is refused; the EAGLE modules against a slow reference
that runs every chain on its own; training that learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from techniques.draft_heads import (
    EagleModule,
    HeadSpec,
    MedusaHead,
    Target,
    check_target,
    eagle3_layers,
    load_head,
    save_head,
)
from techniques.draft_heads.corpus import Text, WritingPlan, batches, frequent_ids
from techniques.draft_heads.files import head_shapes, with_target
from techniques.draft_heads.trainees import TrainEagle, TrainEagle3, Trainee, TrainMedusa
from tests.helpers.fusing import FusingLinear
from tests.helpers.heads import tiny_target
from tests.helpers.tiny_models import hf_model, tiny_model
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.models.loader import load_model

#: Published names of the tensors of each layout, one residual block and two heads for Medusa.
NAMES = {
    "medusa": ["0.0.linear.weight", "0.0.linear.bias", "0.1.weight", "1.0.linear.weight"]
    + ["1.0.linear.bias", "1.1.weight", "d2t"],
    "eagle": ["fc.weight", "fc.bias", "layers.0.post_attention_layernorm.weight"]
    + [f"layers.0.self_attn.{p}_proj.weight" for p in "qkvo"]
    + [f"layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")],
    "eagle3": ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"]
    + [f"midlayer.{n}.weight" for n in ("input_layernorm", "hidden_norm")]
    + ["midlayer.post_attention_layernorm.weight"]
    + [f"midlayer.self_attn.{p}_proj.weight" for p in "qkvo"]
    + [f"midlayer.mlp.{p}_proj.weight" for p in ("gate", "up", "down")],
}
DRAFT_IDS = torch.tensor([3, 4, 9, 17, 40, 41, 42, 90])
every_kind = pytest.mark.parametrize("kind", NAMES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def target() -> Target:
    return tiny_target(tiny_model("llama"))


def trainee(kind: str) -> Trainee:
    if kind == "medusa":
        return TrainMedusa(TrainMedusa.Options(num_heads=2))
    return (
        TrainEagle(TrainEagle.Options())
        if kind == "eagle"
        else TrainEagle3(TrainEagle3.Options(num_unroll=3))
    )


def make(kind: str, target: Target) -> tuple[HeadSpec, Any]:
    """A head of random weights, over eight ids where the kind has a vocabulary of its own."""
    size = target.spec.vocab_size if kind == "eagle" else len(DRAFT_IDS)
    spec = with_target(trainee(kind).spec(target, size), "tiny", target)
    d2t = None if kind == "eagle" else DRAFT_IDS - torch.arange(size)
    module = trainee(kind).make(spec, target, d2t)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return spec, module


def saved(kind: str, target: Target, folder: Path) -> Path:
    spec, module = make(kind, target)
    return save_head(folder / kind, spec, module.state_dict(), torch.float32)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- files ----------------------------------------------------------------------------------------


@every_kind
def test_round_trip_in_the_published_layout(kind: str, target: Target, tmp_path: Path) -> None:
    spec, module = make(kind, target)
    folder = save_head(tmp_path / kind, spec, module.state_dict(), torch.float32)
    assert sorted(load_file(folder / "model.safetensors")) == sorted(NAMES[kind])
    loaded = load_head(folder, target.spec)
    check_target(loaded, target)
    assert (loaded.spec.kind, loaded.spec.trained_for) == (kind, spec.trained_for)
    assert head_shapes(loaded.spec) == head_shapes(spec)
    assert loaded.spec.aux_layers == spec.aux_layers
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state[name], tensor), name


def test_round_trip_of_heads_that_share_the_target_s_output_layer(
    target: Target, tmp_path: Path
) -> None:
    spec = HeadSpec("medusa", 64, 128, 128, num_heads=3, num_layers=2, shares_lm_head=True)
    module = MedusaHead(spec, target.lm_head())
    loaded = load_head(save_head(tmp_path / "h", spec, module.state_dict(), torch.bfloat16))
    assert loaded.spec == spec
    assert not [name for name in loaded.state if name.endswith(".2.weight")]
    assert {t.dtype for t in loaded.state.values()} == {torch.bfloat16}


def test_published_files_of_other_shapes_are_read(target: Target, tmp_path: Path) -> None:
    """Medusa's own file, and an EAGLE head that repeats the target's embeddings."""
    folder = saved("medusa", target, tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "medusa_lm_head.pt")
    assert load_head(folder, target.spec).state.keys() == state.keys()
    folder = saved("eagle", target, tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "embed_tokens.weight": torch.zeros(128, 64)}, folder / "model.safetensors")
    change(folder, architectures=["LlamaForCausalLM"])
    assert load_head(folder, target.spec).state.keys() == state.keys()


@every_kind
def test_heads_for_another_model_are_refused(kind: str, target: Target, tmp_path: Path) -> None:
    folder = saved(kind, target, tmp_path)
    wider = dataclasses.replace(target.spec, hidden_size=96)
    with pytest.raises(WorkbenchError, match=r"hidden size of 64.*has 96"):
        load_head(folder, wider)
    with pytest.raises(WorkbenchError, match=r"vocabulary of 128.*has 130"):
        load_head(folder, dataclasses.replace(target.spec, vocab_size=130))
    other = tiny_target(tiny_model("llama", weight_seed=5))
    with pytest.raises(WorkbenchError, match="trained for 'tiny'"):
        check_target(load_head(folder, other.spec), other)


@every_kind
def test_wrong_weights_are_named(kind: str, target: Target, tmp_path: Path) -> None:
    folder = saved(kind, target, tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    first, second = NAMES[kind][:2]
    lacking = {k: v for k, v in state.items() if k != first}
    lacking |= {"surplus": torch.zeros(1), second: torch.zeros(5)}
    save_file(lacking, path)
    with pytest.raises(WorkbenchError) as raised:
        load_head(folder, target.spec)
    text = str(raised.value)
    assert f"Missing: {first}." in text and "Unexpected: surplus." in text
    assert f"{second} has [5], expected" in text
    path.write_bytes(b"\x00" * 9)
    with pytest.raises(WorkbenchError, match="truncated"):
        load_head(folder)
    path.unlink()
    with pytest.raises(WorkbenchError, match="no weights"):
        load_head(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"], "num_hidden_layers": 12}, "no draft head.*Medusa.*EAGLE"),
        ({"medusa_num_heads": 3, "hidden_size": 64}, "no key 'vocab_size'"),
        ({"num_hidden_layers": 1, "model_type": "mamba"}, "'mamba'.*Valid: llama"),
        ({"draft_vocab_size": 9, "norm_before_residual": True}, "norm_before_residual"),
    ],
)
def test_unknown_layouts_are_errors(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkbenchError, match=message) as raised:
        load_head(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_map_that_points_nowhere_is_refused(target: Target, tmp_path: Path) -> None:
    folder = saved("eagle3", target, tmp_path)
    state = load_file(folder / "model.safetensors")
    for wrong in (torch.full((8,), 200), -torch.arange(8)):
        save_file({**state, "d2t": wrong}, folder / "model.safetensors")
        with pytest.raises(WorkbenchError, match="different ids from 0 to 127"):
            load_head(folder)


def test_layers_whose_states_eagle3_reads(target: Target, tmp_path: Path) -> None:
    assert eagle3_layers(30) == (2, 15, 27)
    assert eagle3_layers(2) == (1, 1, 2)
    folder = saved("eagle3", target, tmp_path)
    change(folder, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    with pytest.raises(WorkbenchError, match="three from 0 to 2"):
        load_head(folder, target.spec)
    change(folder, eagle_aux_hidden_state_layer_ids=None)
    assert load_head(folder, target.spec).spec.aux_layers == (1, 1, 2)
    nested = {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}
    change(folder, eagle_config=nested)
    with pytest.raises(WorkbenchError, match="counted differently"):
        load_head(folder, target.spec)


# -- hidden states --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_tied", "gemma3"])
def test_kept_hidden_states_are_those_of_transformers(family: str) -> None:
    """Those that enter each layer; also of texts of several lengths at once."""
    folder = tiny_model(family, **({"final_logit_softcapping": None} if "gemma" in family else {}))
    target = tiny_target(folder)
    texts = [[5, 6, 7, 8, 9, 20], [30, 31, 32]]
    layers = list(range(target.spec.num_layers))
    states = target.hidden_states(texts, layers)
    assert states.final.shape == (2, 6, target.spec.hidden_size)
    for row, text in enumerate(texts):
        with torch.inference_mode():
            found = hf_model(folder)(torch.tensor([text]), output_hidden_states=True)
        theirs = found.hidden_states
        ours = states.kept[row, : len(text)].split(target.spec.hidden_size, dim=-1)
        for index in layers:
            torch.testing.assert_close(ours[index], theirs[index][0], atol=1e-4, rtol=1e-4)
        own = states.final[row, : len(text)]
        torch.testing.assert_close(own, theirs[-1][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own @ target.lm_head().T, found.logits[0], atol=1e-4, rtol=1e-4)


def test_fused_steps_keep_the_same_states(target: Target) -> None:
    fused = Target(
        load_model(tiny_model("llama"), linear=FusingLinear(), dtype=torch.float32, device="cpu")
    )
    texts, layers = [[5, 6, 7, 8], [30, 31]], [0, 1, 2, 2]
    ours, theirs = (t.hidden_states(texts, layers) for t in (fused, target))
    torch.testing.assert_close(ours.kept, theirs.kept, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.final, theirs.final, atol=1e-5, rtol=1e-5)
    assert fused.hidden_states(texts).kept.shape == (2, 4, 0), "kept what nobody asked for"


# -- modules --------------------------------------------------------------------------------------


def slow_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def slow_chain(
    state: dict[str, torch.Tensor],
    spec: HeadSpec,
    target: Target,
    hidden: torch.Tensor,
    ids: list[int],
    base: int,
    num_steps: int,
) -> list[torch.Tensor]:
    """Features of the chain behind one base, one token and one head of attention at a time, as a
    drafter with a cache computes them: places up to the base from the target's hidden states, then
    the chain's own."""
    third, layer = spec.kind == "eagle3", spec.layer
    prefix = "midlayer." if third else "layers.0."
    shape, eps = layer.layers[0].attention, layer.norm_eps
    dim, groups = shape.head_dim, shape.num_heads // shape.num_kv_heads
    theta = layer.layers[0].rope.theta

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        half = dim // 2
        angles = torch.tensor([position * theta ** (-2 * i / dim) for i in range(half)])
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])

    keys: list[list[torch.Tensor]] = []
    values: list[list[torch.Tensor]] = []

    def run(features: torch.Tensor, token: int, position: int) -> torch.Tensor:
        embed = target.embedding()[token]
        if third:
            x = torch.cat(
                [
                    slow_norm(embed, state["midlayer.input_layernorm.weight"], eps),
                    slow_norm(features, state["midlayer.hidden_norm.weight"], eps),
                ]
            )
        else:
            x = features = state["fc.weight"] @ torch.cat([embed, features]) + state["fc.bias"]
        q, k, v = (state[f"{prefix}self_attn.{n}_proj.weight"] @ x for n in "qkv")
        keys.append([turn(part, position) for part in k.split(dim)])
        values.append(list(v.split(dim)))
        out = []
        for head, part in enumerate(q.split(dim)):
            turned = turn(part, position)
            scores = torch.stack([turned @ k[head // groups] for k in keys]) * dim**-0.5
            weights = scores.softmax(0)
            out.append(sum(w * v[head // groups] for w, v in zip(weights, values, strict=True)))
        y = features + state[f"{prefix}self_attn.o_proj.weight"] @ torch.cat(out)
        x = slow_norm(y, state[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up, down = (state[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return y + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    for j in range(base + 1):
        features = run(state["fc.weight"] @ hidden[j] if third else hidden[j], ids[j + 1], j)
    chain = [features]
    for step in range(1, num_steps):
        chain.append(run(chain[-1], ids[base + 1 + step], base + step))
    return chain


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_eagle_modules_equal_chains_run_one_by_one(kind: str, target: Target) -> None:
    spec, module = make(kind, target)
    state = {k: v.detach() for k, v in module.state_dict().items()}
    texts = [[5, 6, 7, 8, 30, 31, 9, 20, 11], [40, 41, 42, 43, 90, 5, 17, 17, 3]]
    size, steps = 6, 3
    states = target.hidden_states([text[:size] for text in texts], spec.aux_layers)
    hidden = states.kept if kind == "eagle3" else states.final
    with torch.no_grad():
        found = module(hidden, torch.tensor(texts), steps)
    for row, text in enumerate(texts):
        for base in (0, 1, size - 1):
            chain = slow_chain(state, spec, target, hidden[row], text, base, steps)
            for step, features in enumerate(chain):
                torch.testing.assert_close(found[step][row, base], features, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        logits = module.logits(found[0])
    features = found[0][1, 2]
    if kind == "eagle3":
        normed = slow_norm(features, state["norm.weight"], spec.layer.norm_eps)
        torch.testing.assert_close(logits[1, 2], state["lm_head.weight"] @ normed)
        assert torch.equal(module.draft_ids, DRAFT_IDS)
        assert module.t2d.nonzero().flatten().tolist() == DRAFT_IDS.tolist()
    else:
        torch.testing.assert_close(logits[1, 2], target.lm_head() @ features)


def test_medusa_heads_equal_their_formula(target: Target) -> None:
    _, module = make("medusa", target)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    state = module.state_dict()
    for head in range(2):
        block = torch.nn.functional.silu(
            x @ state[f"{head}.0.linear.weight"].T + state[f"{head}.0.linear.bias"]
        )
        logits = (x + block) @ state[f"{head}.1.weight"].T
        torch.testing.assert_close(module(x)[head], logits)
        best = DRAFT_IDS[logits.topk(3, dim=-1).indices]
        ids, logprobs = module.top(x, 3)
        assert torch.equal(ids[:, head], best)
        wanted = logits.log_softmax(-1).topk(3, dim=-1).values
        torch.testing.assert_close(logprobs[:, head], wanted)


def test_untrained_medusa_heads_guess_what_the_target_says_next(target: Target) -> None:
    spec = HeadSpec("medusa", 64, 128, 128, num_heads=2, shares_lm_head=True)
    x = target.hidden_states([[5, 6, 7]]).final
    logits = MedusaHead(spec, target.lm_head())(x)
    torch.testing.assert_close(logits[1], x @ target.lm_head().T)


# -- text -----------------------------------------------------------------------------------------


def test_most_frequent_ids_and_a_split_that_shares_nothing() -> None:
    texts = [Text([1, 1, 1, 7, 7, 9], 2), Text([2, 7, 9, 9, 9], 1)]
    assert frequent_ids(texts, 2, 20).tolist() == [7, 9]
    assert frequent_ids(texts, 5, 20).tolist() == [0, 1, 2, 7, 9]
    plan = WritingPlan(max_tokens=4, samples_per_prompt=1, held_out_fraction=0.25, seed=1)
    train, held_out = plan.split([[i] for i in range(12)])
    assert len(held_out) == 3
    assert sorted([*train, *held_out]) == list(range(12))
    assert plan.split([[i] for i in range(12)]) == (train, held_out)
    with pytest.raises(ConfigError, match="1 prompts"):
        plan.split([[1]])


def test_batches_hold_every_text_once_within_their_size() -> None:
    texts = [Text(list(range(3, 3 + n)), 1) for n in (5, 9, 2, 30, 7, 7)]
    found = list(batches(texts, 16, torch.device("cpu"), seed=4))
    assert sorted(len(t.token_ids) for b in found for t in b.texts) == [2, 5, 7, 7, 9, 30]
    for batch in found:
        assert batch.token_ids.numel() <= 16 or len(batch.texts) == 1
        for row, text in enumerate(batch.texts):
            size = len(text.token_ids)
            assert batch.token_ids[row, :size].tolist() == text.token_ids
            assert batch.is_output[row].nonzero().flatten().tolist() == list(range(1, size))


def test_options_out_of_range_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"head\.num_unroll=0 must be 1"):
        TrainEagle3(TrainEagle3.Options(num_unroll=0))
    assert isinstance(make("eagle3", tiny_target(tiny_model("llama")))[1], EagleModule)
