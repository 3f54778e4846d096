"""Quantisers against round to nearest and the best there is, and the pipeline over tiny models."""

from __future__ import annotations

import itertools
import re
import statistics as statistics_
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from techniques.quantization import QuantizedWeight, WeightScheme, encode, find_grid
from techniques.quantization.quantizers import (
    AWQ,
    GPTQ,
    HQQ,
    RTN,
    AWQOptions,
    GPTQOptions,
    HQQOptions,
    InputStatistics,
    PipelineOptions,
    PlainLinear,
    QuantizedModel,
    RTNOptions,
    quantize_decoder,
)
from techniques.quantization.quantizers.base import output_error
from techniques.quantization.quantizers.folding import fold_scales, folds_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.whole_models import whole_logits
from workbench.core.errors import ConfigError, UnsupportedError, WorkbenchError
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.slots.linear import DenseLinear

W4G32 = WeightScheme(4, 32)
#: Factors on a grid that a search by brute force tries.
SHRINKS = torch.linspace(1.2, 0.2, 100_000)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs with few directions that matter and sizes that differ, as in trained models."""
    mixed = drawn(rows, width // 4, seed=seed) @ drawn(width // 4, width, seed=seed + 1)
    sizes = torch.logspace(-0.7, 0.7, width)[
        torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    ]
    return (mixed / width**0.5 + 0.15 * drawn(rows, width, seed=seed + 2)) * sizes


def statistics(x: Tensor, **options: Any) -> InputStatistics:
    found = InputStatistics("layer", x.shape[1], num_rows=len(x), **options)
    found.add(x)
    return found


def error_of(found: QuantizedWeight, weight: Tensor, x: Tensor) -> float:
    return output_error(weight, found.dequantize(), x)


# -- statistics -------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_batches() -> None:
    x = drawn(100, 8)
    whole, parts = statistics(x), InputStatistics("layer", 8, num_rows=100)
    few = InputStatistics("layer", 8, num_rows=10), InputStatistics("layer", 8, num_rows=10)
    for part in x.split(17):
        parts.add(part)
        few[0].add(part)
    few[1].add(x)
    assert parts.num_tokens == 100 and torch.equal(parts.rows, x)
    for found in (parts, whole):
        wanted = (x.double().T @ x.double()) / 100
        torch.testing.assert_close(found.hessian, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.mean_abs, x.abs().mean(0))
    assert torch.equal(few[0].rows, few[1].rows) and len(few[0].rows) == 10
    later = [int((x == row).all(1).nonzero()) for row in few[0].rows]
    assert later == sorted(later) and later[-1] >= 50  # drawn from all of the text
    factors = drawn(8).exp()
    scaled, again = whole.scaled(factors), statistics(x / factors)
    for name in ("hessian", "mean_abs", "rows"):
        pair = getattr(scaled, name), getattr(again, name)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(broken: float) -> None:
    found, x = InputStatistics("layers.3.o_proj", 8), drawn(6, 8)
    found.add(x)
    x[4, 1] = broken
    with pytest.raises(WorkbenchError, match=r"layers\.3\.o_proj is not finite \(token 10 "):
        found.add(x)


# -- each by itself ---------------------------------------------------------------------------


def test_round_to_nearest_and_its_clip() -> None:
    weight = drawn(16, 128)
    weight[:, 5] *= 6  # an outlier a group is worth clipping
    plain = RTN().quantize(weight, W4G32, None)
    assert torch.equal(plain.codes, encode(weight, W4G32, *find_grid(weight, W4G32)).codes)
    clipped = RTN(RTNOptions(clip_steps=20)).quantize(weight, W4G32, None)

    def errors(found: QuantizedWeight) -> Tensor:
        return (found.dequantize() - weight).square().view(16, 4, 32).sum(2)

    assert (errors(clipped) <= errors(plain)).all()
    assert errors(clipped).sum() < 0.9 * errors(plain).sum()
    with pytest.raises(ConfigError, match="clip search of 0 steps"):
        RTN(RTNOptions(clip_steps=0)).quantize(weight, W4G32, None)


@pytest.mark.parametrize("name", ["w4g32", "w4g32z", "w4", "w8g64"])
def test_gptq_without_correlation_is_round_to_nearest(name: str) -> None:
    scheme, weight = WeightScheme.parse(name), drawn(24, 128) + 0.1
    inputs = statistics(torch.eye(128) * 128**0.5)
    for options in ({}, {"act_order": True, "static_groups": True}, {"block_size": 24}):
        found = GPTQ(GPTQOptions(**options)).quantize(weight, scheme, inputs)
        wanted = RTN().quantize(weight, scheme, None)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scales, wanted.scales)
        assert found.group_index is None
        if wanted.zeros is not None:
            assert found.zeros is not None and torch.equal(found.zeros, wanted.zeros)


@pytest.mark.parametrize("name", ["w4g32", "w4g32z", "w4", "w4g128"])
def test_gptq_has_less_output_error_than_round_to_nearest(name: str) -> None:
    """On text that it has not seen, by a quarter at least, with act-order by two fifths."""
    scheme, weight = WeightScheme.parse(name), drawn(48, 256, seed=5) / 16
    x = correlated(3000, 256)
    seen, unseen = x[:2000], x[2000:]
    inputs = statistics(seen)
    rtn = error_of(RTN().quantize(weight, scheme, None), weight, unseen)
    errors = {
        (order, static): error_of(
            GPTQ(GPTQOptions(act_order=order, static_groups=static)).quantize(
                weight, scheme, inputs
            ),
            weight,
            unseen,
        )
        for order, static in itertools.product((False, True), repeat=2)
    }
    for (act_order, _), error in errors.items():
        assert error < (0.6 if act_order else 0.75) * rtn
    assert errors[True, False] <= errors[False, False]
    assert errors[True, True] <= errors[False, True]


def slow_gptq(weight: Tensor, scheme: WeightScheme, inputs: InputStatistics) -> QuantizedWeight:
    """Straight from the paper's section 3: after each column, all columns that are left are
    corrected, and the inverse Hessian loses the column's row by Gaussian elimination."""
    w, hessian = weight.double(), inputs.hessian
    inverse = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
    size = scheme.group_size
    codes, scales, zeros = torch.zeros_like(weight, dtype=torch.int16), [], []
    for j in range(weight.shape[1]):
        if j % size == 0:
            scale, zero = find_grid(
                w[:, j : j + size].float(), WeightScheme(4, 0, scheme.has_zeros)
            )
            scales.append(scale)
            zeros.append(torch.zeros(len(w), 1, dtype=torch.int16) if zero is None else zero)
        value = w[:, j : j + 1].float()
        one = encode(
            value, scheme_of_one(scheme), scales[-1], zeros[-1] if zero is not None else None
        )
        codes[:, j : j + 1] = one.codes
        error = (value - one.dequantize()).double()[:, 0] / inverse[j, j]
        w = w - torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    has = scheme.has_zeros
    return QuantizedWeight(
        scheme, codes, torch.cat(scales, 1), torch.cat(zeros, 1) if has else None
    )


def scheme_of_one(scheme: WeightScheme) -> WeightScheme:
    return WeightScheme(scheme.bits, 0, scheme.has_zeros)


@pytest.mark.parametrize("block_size", [128, 32, 24, 7, 1])
@pytest.mark.parametrize("name", ["w4g32", "w4g64z"])
def test_gptq_s_blocks_change_nothing(name: str, block_size: int) -> None:
    """Also groups that lie across blocks begin from weights with every correction."""
    scheme, weight = WeightScheme.parse(name), drawn(16, 128, seed=3)
    inputs = statistics(correlated(500, 128))
    wanted = slow_gptq(weight, scheme, inputs)
    found = GPTQ(GPTQOptions(block_size=block_size)).quantize(weight, scheme, inputs)
    assert (found.codes != wanted.codes).float().mean() < 0.005  # a tie may fall the other way
    torch.testing.assert_close(found.scales[:, 0], wanted.scales[:, 0])
    assert ((found.scales / wanted.scales - 1).abs() > 1e-3).float().mean() < 0.05


def test_gptq_in_another_order_says_which_group_an_input_has() -> None:
    scheme, weight, x = W4G32, drawn(8, 128), correlated(500, 128)
    found = GPTQ(GPTQOptions(act_order=True)).quantize(weight, scheme, statistics(x))
    assert found.group_index is not None and found.group_index.dtype == torch.int32
    assert found.group_index.bincount().tolist() == [32] * 4
    largest = x.square().sum(0).argsort(descending=True)
    assert (found.group_index[largest[:32]] == 0).all()
    assert (found.group_index[largest[-32:]] == 3).all()


def test_gptq_s_dead_inputs() -> None:
    """Their weights are rounded to nearest and move nothing else."""
    weight, x = drawn(8, 64), correlated(300, 64)
    x[:, 10] = 0
    scheme = WeightScheme(8, 0)
    found = GPTQ().quantize(weight, scheme, statistics(x))
    rtn = RTN().quantize(weight, scheme, None)
    assert torch.equal(found.codes[:, 10], rtn.codes[:, 10])
    other = weight.clone()
    other[:, 10] *= 0.5
    again = GPTQ().quantize(other, scheme, statistics(x))
    same_grid = (again.scales == found.scales).all(1)
    live = [i for i in range(64) if i != 10]
    assert same_grid.any()
    assert torch.equal(again.codes[same_grid][:, live], found.codes[same_grid][:, live])


def test_gptq_refuses() -> None:
    weight, x = drawn(4, 64), drawn(3, 64)  # three inputs cannot tell 64 weights apart
    with pytest.raises(WorkbenchError, match=r"q: the Hessian .* damp=0"):
        GPTQ(GPTQOptions(damp=0.0)).quantize(weight, W4G32, statistics(x * 0 + 1), "q")
    with pytest.raises(ConfigError, match="needs calibration"):
        GPTQ().quantize(weight, W4G32, None, "q")
    with pytest.raises(ConfigError, match="outer products"):
        GPTQ().quantize(weight, W4G32, statistics(x, keep_hessian=False), "q")
    for wrong in ({"damp": -0.1}, {"damp": float("nan")}, {"block_size": 0}):
        with pytest.raises(ConfigError, match="must be"):
            GPTQOptions(**wrong)


def test_against_every_choice_of_codes() -> None:
    """Of one output of four inputs, on the quantiser's own grid, over 60 weights."""
    scheme = WeightScheme(4, 0)
    every = torch.tensor(list(itertools.product(range(-8, 8), repeat=4))).float()
    quantizers = {"rtn": RTN(), "gptq": GPTQ(), "order": GPTQ(GPTQOptions(act_order=True))}
    quantizers["awq"] = AWQ(AWQOptions(clip_steps=1))
    ratios: dict[str, list[float]] = {name: [] for name in quantizers}
    for seed in range(60):
        weight, x = drawn(1, 4, seed=seed), correlated(64, 4, seed=seed + 100)
        for name, quantizer in quantizers.items():
            found = quantizer.quantize(weight, scheme, statistics(x))
            hessian = statistics(x).hessian
            deltas = torch.cat([every * found.scales, found.dequantize()]) - weight
            errors = (deltas.double() @ hessian * deltas).sum(1).sqrt()
            ratios[name].append(float(errors[-1] / errors[:-1].min()))
        # Without correlation the nearest codes are the best ones.
        deltas = every * found.scales - weight
        nearest = RTN().quantize(weight, scheme, None).codes[0]
        assert torch.equal(every[deltas.square().sum(1).argmin()].short(), nearest)
    assert all(ratio > 0.999 for each in ratios.values() for ratio in each)
    median = {name: statistics_.median(each) for name, each in ratios.items()}
    assert median["order"] < median["gptq"] < 1.2 < 1.3 < median["rtn"] < 1.6
    assert median["order"] < 1.1
    assert ratios["awq"] == ratios["rtn"]  # what AWQ adds is scales, and here are none


# -- AWQ --------------------------------------------------------------------------------------


def with_outliers(rows: int, width: int) -> Tensor:
    x = drawn(rows, width, seed=8)
    x[:, ::17] *= 20
    return x


@pytest.mark.parametrize("name", ["w4g32", "w4g32z", "w4"])
def test_awq_saves_the_weights_of_large_inputs(name: str) -> None:
    scheme, weights = WeightScheme.parse(name), [drawn(32, 128), drawn(16, 128, seed=1)]
    x = with_outliers(400, 128)
    awq, inputs = AWQ(), statistics(x[:200])
    scales = awq.find_scales(weights, scheme, inputs)
    assert scales is not None and scales[::17].min() > scales[1]
    for weight in weights:
        found = awq.quantize(weight * scales, scheme, inputs.scaled(scales))
        error = error_of(found, weight * scales, x[200:] / scales)
        rtn = error_of(RTN().quantize(weight, scheme, None), weight, x[200:])
        assert error < 0.75 * rtn


def test_awq_never_scales_to_its_harm() -> None:
    """On the inputs that it searches on: the exponent 0 is among the candidates."""
    weight, inputs = drawn(32, 128), statistics(drawn(300, 128))
    for steps in (1, 20):
        awq = AWQ(AWQOptions(alpha_steps=steps, clip_steps=1))
        scales = awq.find_scales([weight], W4G32, inputs)
        assert scales is not None
        found = awq.quantize(weight * scales, W4G32, inputs.scaled(scales))
        error = error_of(found, weight * scales, inputs.rows / scales)
        rtn = error_of(RTN().quantize(weight, W4G32, None), weight, inputs.rows)
        assert error <= rtn * 1.0001
        assert steps > 1 or (scales == 1).all()


def test_awq_clips_by_the_output_and_not_where_it_is_told_not_to() -> None:
    weight, inputs = drawn(32, 128), statistics(correlated(300, 128))
    plain = RTN().quantize(weight, W4G32, None)
    clipped = AWQ().quantize(weight, W4G32, inputs, "layers.0.v_proj")
    assert (clipped.scales <= plain.scales).all() and (clipped.scales < plain.scales).any()

    def group_error(found: QuantizedWeight) -> Tensor:
        delta = (weight - found.dequantize()).view(32, 4, 32)
        return torch.einsum("sgi,ngi->ngs", inputs.rows.view(-1, 4, 32), delta).square().sum(2)

    assert (group_error(clipped) <= group_error(plain) * 1.0001).all()
    kept = AWQ().quantize(weight, W4G32, inputs, "layers.0.q_proj")
    assert torch.equal(kept.scales, plain.scales)
    with pytest.raises(ConfigError, match="needs a sample"):
        AWQ().quantize(weight, W4G32, InputStatistics("q", 128))
    with pytest.raises(ConfigError, match="alpha_steps=0"):
        AWQOptions(alpha_steps=0)


# -- HQQ --------------------------------------------------------------------------------------


def norm_error(found: QuantizedWeight, weight: Tensor) -> Tensor:
    """``sum |W - Q| ** 0.7`` of each group."""
    error = (found.dequantize() - weight).abs().pow(0.7)
    return error.view(*found.scales.shape, -1).sum(2)


@pytest.mark.parametrize("name", ["w4g32", "w4g32z", "w4z"])
def test_hqq_has_less_error_in_its_norm(name: str) -> None:
    """In no group more than round to nearest, on the whole less, at any size of weights."""
    scheme, weight = WeightScheme.parse(name), drawn(32, 128) + 0.2
    weight[3, :32] = 0
    weight[4] = weight[4].abs()
    for size in (1.0, 1e-3):
        found = HQQ().quantize(weight * size, scheme, None)
        rtn = RTN().quantize(weight * size, scheme, None)
        ours, theirs = norm_error(found, weight * size), norm_error(rtn, weight * size)
        assert (ours <= theirs * 1.0001).all() and (found.scales > 0).all()
        assert ours.sum() < 0.97 * theirs.sum()
        assert (found.dequantize()[3, :32] == 0).all()
    for wrong in ({"norm": 1.0}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": 0}):
        with pytest.raises(ConfigError, match="must be"):
            HQQOptions(**wrong)


def test_hqq_against_every_scale() -> None:
    """Of one output of four inputs: what of the way from round to nearest to the best symmetric
    grid is gone."""
    scheme, shares = WeightScheme(4, 0), []
    for seed in range(40):
        weight = drawn(1, 4, seed=seed)
        full, _ = find_grid(weight, scheme)
        tried = norm_error(
            encode(weight.expand(100_000, 4), scheme, full * SHRINKS[:, None]), weight
        )
        best, rtn = (
            float(tried.min()),
            float(norm_error(RTN().quantize(weight, scheme, None), weight)),
        )
        found = HQQ(HQQOptions(iterations=50)).quantize(weight, scheme, None)
        own = float(norm_error(found, weight))
        assert own >= best * 0.95  # one weight that is met exactly may lie between those tried
        shares.append((rtn - own) / (rtn - best) if rtn > best * 1.001 else 1.0)
    # Where the largest weight alone sets the grid it is met exactly, which no small step improves.
    assert min(shares) > -1e-4 and sum(shares) / 40 > 0.4


# -- over a model -----------------------------------------------------------------------------


def loaded(family: str = "llama", **overrides: Any) -> Decoder:
    return load_model(
        tiny_model(family, **overrides),
        linear=PlainLinear(),
        dtype=torch.float32,
        device="cpu",
    )


def some_texts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(4, 128, (20 + 7 * i % 50,), generator=generator).tolist()
        for i in range(count)
    ]


TEXTS, UNSEEN = some_texts(24), some_texts(8, seed=9)


def divergence(decoder: Decoder, original: Tensor) -> float:
    """Mean KL of the original's next tokens from the decoder's, in nats."""
    found = whole_logits(decoder, UNSEEN).log_softmax(1)
    wanted = original.log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def test_kl_of_a_model_orders_the_quantisers() -> None:
    original = whole_logits(loaded(), UNSEEN)
    found: dict[str, float] = {}
    for name, quantizer in {
        "rtn": RTN(),
        "clipped": RTN(RTNOptions(clip_steps=10)),
        "gptq": GPTQ(),
        "act_order": GPTQ(GPTQOptions(act_order=True)),
        "awq": AWQ(),
        "hqq": HQQ(),
    }.items():
        decoder = loaded()
        result = quantize_decoder(decoder, quantizer, W4G32, TEXTS)
        found[name] = divergence(decoder, original)
        for shard, weight in result.weights.items():  # what the decoder runs is what was found
            assert weight.codes.dtype == torch.int16, shard
    assert found["gptq"] < 0.8 * found["rtn"]
    assert found["act_order"] < 0.8 * found["rtn"]
    assert found["awq"] < 0.95 * found["rtn"]
    assert found["hqq"] < 0.95 * found["rtn"]


def test_gptq_takes_a_real_layer_in_seconds() -> None:
    """A bound that only a loop over outputs, or a solve a column, would miss."""
    weight, x = drawn(576, 1536), drawn(512, 1536)
    inputs = InputStatistics("down_proj", 1536)
    inputs.add(x)
    started = time.process_time()
    GPTQ().quantize(weight, WeightScheme(4, 64), inputs)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("family", ["llama", "llama_biases", "qwen3", "gemma3"])
def test_folding_leaves_the_model_s_function(family: str) -> None:
    """Also where heads agree in number, so that ``v_proj`` takes factors too."""
    overrides: dict[str, Any] = {"num_key_value_heads": 4}
    decoder = loaded(family, **overrides)
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        decoder.layers[0].attention_norm[3] = -decoder.spec.norm_offset  # an input that is always 0
        original = whole_logits(decoder, UNSEEN)
        for layer in decoder.layers:
            folds = folds_of(layer)
            assert [fold.consumer.name.split(".")[-1] for fold in folds] == [
                "qkv_proj",
                "o_proj",
                "gate_up_proj",
                "down_proj",
            ]
            for seed, fold in enumerate(folds):
                before = fold.consumer.state.weight.clone()
                scales = drawn(fold.consumer.in_features, seed=seed).mul(0.7).exp()
                used, tensors = fold_scales(decoder, layer, fold, scales)
                assert torch.isfinite(used).all()
                assert not torch.equal(before, fold.consumer.state.weight)
                changed |= tensors
    torch.testing.assert_close(whole_logits(decoder, UNSEEN), original, rtol=2e-4, atol=2e-4)
    layers = [f"model.layers.{i}" for i in range(len(decoder.layers))]
    wanted = {f"{layer}.input_layernorm.weight" for layer in layers}
    norm = "pre_feedforward" if family == "gemma3" else "post_attention"
    wanted |= {f"{layer}.{norm}_layernorm.weight" for layer in layers}
    if family == "llama_biases":
        wanted |= {f"{layer}.self_attn.v_proj.bias" for layer in layers}
        wanted |= {f"{layer}.mlp.up_proj.bias" for layer in layers}
    assert set(changed) == wanted


def test_heads_that_share_values_take_no_factors() -> None:
    folded = [fold.consumer.name for fold in folds_of(loaded("llama").layers[0])]
    assert folded == ["layers.0.qkv_proj", "layers.0.gate_up_proj", "layers.0.down_proj"]


class Remembering(RTN):
    """Round to nearest that keeps what it was given."""

    needs = GPTQ.needs

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Tensor, InputStatistics]] = {}

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        assert inputs is not None
        self.seen[name] = weight.clone(), inputs
        return super().quantize(weight, scheme, inputs, name)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_layer_sees_its_own_inputs(family: str) -> None:
    """Statistics are those of a plain pass through the model with the layers before quantised."""
    quantizer, decoder = Remembering(), loaded(family)
    result = quantize_decoder(
        decoder, quantizer, W4G32, TEXTS, PipelineOptions(batch_tokens=100, num_rows=50)
    )
    last = len(decoder.layers) - 1
    names = [name for name in quantizer.seen if f".{last}." in name]
    assert len(names) == 7
    # What the last layer's queries are made from, by the decoder's own pass.
    plain = loaded(family)
    for name, weight in result.weights.items():
        if f".{last}." not in name:
            index, part = int(name.split(".")[2]), name.rpartition(".")[2]
            for linear in plain.layers[index].linears:
                start = 0
                for shard, width in linear.shards:
                    if shard.endswith(f".{part}"):
                        linear.state.weight[start : start + width] = weight.dequantize()
                    start += width
    inputs: dict[str, list[Tensor]] = {}
    assert isinstance(plain.linear, PlainLinear)
    plain.linear.observer = lambda layer, x: inputs.setdefault(layer.name, []).append(x.clone())
    for text in TEXTS:
        whole_logits(plain, [text])
    for name in names:
        weight, found = quantizer.seen[name]
        linear = next(
            li for li in plain.layers[last].linears if name in [shard for shard, _ in li.shards]
        )
        x = torch.cat(inputs[linear.name]).double()
        assert found.num_tokens == len(x) == sum(map(len, TEXTS))
        hessian = x.T @ x / len(x)
        torch.testing.assert_close(found.hessian, hessian, rtol=1e-3, atol=1e-4)
        # The shard by itself, not its neighbours.
        assert weight.shape == result.weights[name].codes.shape


def test_no_more_than_one_layer_s_statistics_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[InputStatistics] = weakref.WeakSet()
    most = 0
    made = InputStatistics.__init__

    def counting(self: InputStatistics, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        made(self, *args, **kwargs)
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(InputStatistics, "__init__", counting)
    quantize_decoder(loaded(num_hidden_layers=4), GPTQ(), W4G32, TEXTS[:4])
    assert most == 4 and not alive


def test_what_is_kept_is_listed_and_unchanged() -> None:
    decoder, original = loaded(), loaded()
    options = PipelineOptions(skip=("*.down_proj", "model.layers.0.self_attn.k_proj"))
    calls: list[tuple[str, int, int]] = []
    result = quantize_decoder(
        decoder,
        AWQ(),
        W4G32,
        TEXTS[:6],
        options,
        lambda entry, done, total: calls.append((entry.name, done, total)),
    )
    assert set(result.kept) == {
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    }
    assert len(result.weights) == 11 and not set(result.kept) & set(result.weights)
    assert [entry.name for entry in result.report] == list(result.weights)
    assert calls == [(name, i + 1, 11) for i, name in enumerate(result.weights)]
    for mine, other in zip(decoder.layers, original.layers, strict=True):
        assert torch.equal(mine.down_proj.state.weight, other.down_proj.state.weight)
    first, second = decoder.layers[0].qkv_proj, original.layers[0].qkv_proj
    assert torch.equal(first.state.weight[64:96], second.state.weight[64:96])
    assert not torch.equal(first.state.weight[:64], second.state.weight[:64])
    # Queries of layer 0 share their inputs with keys that are kept: nothing could be folded.
    scaled = {entry.name: entry.scaled for entry in result.report}
    assert not scaled["model.layers.0.self_attn.q_proj"]
    assert scaled["model.layers.1.self_attn.q_proj"] and scaled["model.layers.0.mlp.up_proj"]
    assert set(result.changed) == {
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }
    assert all(entry.output_error and entry.output_error < 0.2 for entry in result.report)


def rebuilt(family: str, result: QuantizedModel) -> Decoder:
    """A fresh model with what the pipeline gave, by the names of the checkpoint."""
    decoder, left = loaded(family), dict(result.changed)
    for layer in decoder.layers:
        for field in ("attention_norm", "mlp_norm"):
            name = f"{decoder.names.of_layer(layer.index, field)}.weight"
            if name in left:
                setattr(layer, field, left.pop(name))
    for linear in decoder.linear_layers():
        start = 0
        for shard, width in linear.shards:
            if shard in result.weights:
                values = result.weights[shard].dequantize()
                linear.state.weight[start : start + width] = values
            if f"{shard}.bias" in left:
                linear.state.bias[start : start + width] = left.pop(f"{shard}.bias")
            start += width
    assert not left
    return decoder


@pytest.mark.parametrize("family", ["llama_biases", "gemma3"])
def test_the_result_is_all_that_a_checkpoint_needs(family: str) -> None:
    decoder = loaded(family)
    result = quantize_decoder(decoder, AWQ(), WeightScheme(8, 32), TEXTS)
    found = whole_logits(rebuilt(family, result), UNSEEN)
    assert torch.equal(found, whole_logits(decoder, UNSEEN))
    # Eight bits lose little: factors were put in as often as they were taken out.
    assert divergence(decoder, whole_logits(loaded(family), UNSEEN)) < 1e-3


def test_the_head_if_asked_for() -> None:
    decoder, options = loaded(), PipelineOptions(head=True)
    result = quantize_decoder(decoder, GPTQ(), W4G32, TEXTS[:6], options)
    assert result.kept == () and "lm_head" in result.weights and len(result.report) == 15
    assert torch.equal(decoder.lm_head.state.weight, result.weights["lm_head"].dequantize())
    with pytest.raises(UnsupportedError, match="is its embedding"):
        quantize_decoder(loaded("llama_tied"), RTN(), W4G32, [], options)


def test_without_texts() -> None:
    result = quantize_decoder(loaded(), RTN(), W4G32, [])
    assert len(result.weights) == 14
    assert all(entry.output_error is None for entry in result.report)
    for quantizer in (GPTQ(), AWQ()):
        with pytest.raises(ConfigError, match="needs calibration texts; none"):
            quantize_decoder(loaded(), quantizer, W4G32, [])


def test_what_the_pipeline_refuses() -> None:
    with pytest.raises(ConfigError, match=r"groups of 64 .*down_proj \(96 inputs\).*: 16, 32; or"):
        quantize_decoder(loaded(), RTN(), WeightScheme(4, 64), [])
    quantize_decoder(loaded(), RTN(), WeightScheme(4, 64), [], PipelineOptions(("*.down_proj",)))
    with pytest.raises(ConfigError, match=re.escape("skip='*.w2' fits no linear layer")):
        quantize_decoder(loaded(), RTN(), W4G32, [], PipelineOptions(("*.w2",)))
    for wrong, said in (([[]], "has 0 tokens"), ([[5] * 300], "300 tokens"), ([[128]], "to 128")):
        with pytest.raises(WorkbenchError, match=f"calibration text 0 has .*{said[-3:]}"):
            quantize_decoder(loaded(), RTN(), W4G32, wrong)
    broken = loaded()
    broken.layers[1].mlp_norm[3] = float("nan")
    with pytest.raises(WorkbenchError, match=r"input of layers\.1\.gate_up_proj is not finite"):
        quantize_decoder(broken, GPTQ(), W4G32, TEXTS[:2])
    dense = load_model(tiny_model("llama"), linear=DenseLinear(), dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match=r"linear=PlainLinear\(\)"):
        quantize_decoder(dense, RTN(), W4G32, [])
    with pytest.raises(ConfigError, match="batch_tokens=0"):
        PipelineOptions(batch_tokens=0)


class ScalingByHand(Remembering):
    """Scales inputs by known factors."""

    def find_scales(self, weights: object, scheme: WeightScheme, inputs: InputStatistics) -> Tensor:
        return drawn(inputs.in_features, seed=3).mul(0.5).exp()


def test_statistics_follow_what_was_folded() -> None:
    """The weights that are quantised give the same outputs on the inputs that are handed over."""
    plain, scaling = Remembering(), ScalingByHand()
    for quantizer in (plain, scaling):
        quantize_decoder(loaded(num_hidden_layers=1), quantizer, W4G32, TEXTS[:4])
    for name, (weight, inputs) in plain.seen.items():
        other, scaled = scaling.seen[name]
        if name.endswith(("v_proj", "up_proj", "o_proj")):
            continue  # their rows are divided, or nothing is scaled
        assert not torch.equal(weight, other)
        wanted = inputs.rows @ weight.T
        torch.testing.assert_close(scaled.rows @ other.T, wanted, rtol=1e-3, atol=1e-4)
        energy = ((weight.double() @ inputs.hessian) * weight).sum(1)
        found = ((other.double() @ scaled.hessian) * other).sum(1)
        torch.testing.assert_close(found, energy, rtol=1e-3, atol=1e-4)
