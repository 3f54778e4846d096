"""Composition: overrides become a checked configuration; the Python door to the engine."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from tests.helpers.engines import check_idle, together
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench import SamplingParams, build_engine
from workbench.assemble import SLOTS, EngineConfig, Limits, build_config, load_class
from workbench.configuration import (
    Marker,
    compose_config,
    engine_config,
    limits_of,
    load_markers,
    technique_names,
)
from workbench.core.errors import ConfigError
from workbench.engine.engine import Engine

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def test_plain_configuration_fills_every_slot() -> None:
    composed = compose_config([])
    assert set(composed.components) == set(SLOTS)
    assert composed.techniques == {}
    assert "hydra" not in composed.cfg


def test_techniques_are_selected_together_and_keep_their_markers() -> None:
    names = list(together())
    composed = compose_config([f"+technique=[{','.join(names)}]"])
    assert list(composed.techniques) == names
    for name, marker in composed.techniques.items():
        assert marker == load_markers()[name]
        for slot, option in marker.slots.items():
            assert composed.choices[f"engine/{slot}"] == option


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["+technique=a"], ["a"]),
        (["+technique=[a,b]"], ["a", "b"]),
        (["seed=1", "+technique=['a', \"b\"]"], ["a", "b"]),
    ],
)
def test_names_are_read_from_overrides(overrides: list[str], names: list[str]) -> None:
    assert technique_names(overrides) == names


def test_options_of_a_component_can_be_set() -> None:
    composed = compose_config(["engine/kv_cache=paged", "engine.kv_cache.block_size=4"])
    assert composed.components["kv_cache"]["block_size"] == 4


@pytest.mark.parametrize(
    ("node", "word"),
    [
        ({"paper": "p", "sumary": "s"}, "Did you mean 'summary'"),
        ({"paper": "p"}, "lacks"),
    ],
)
def test_marker_must_be_whole(node: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Marker.parse("mine", node)


def test_composition_does_not_leak_into_the_next() -> None:
    compose_config(["+technique=spec_decode", "seed=5"])
    assert compose_config([]).techniques == {}
    assert compose_config([]).cfg.seed == 0


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ("auto", True),
        (7, True),
        (0, False),
        (-1, False),
        ("many", False),
        (2.5, False),
        (True, False),
    ],
)
def test_limits_are_auto_or_positive_integers(given: object, valid: bool) -> None:
    limits = {"max_model_len": "auto", "kv_pool_tokens": "auto", "memory_fraction": 0.9}
    cfg = OmegaConf.create({"limits": {"max_num_seqs": given, **limits}})
    if not valid:
        with pytest.raises(ConfigError, match="max_num_seqs"):
            limits_of(cfg, max_num_seqs=3, max_model_len=64)
        return
    expected = 3 if given == "auto" else given
    assert limits_of(cfg, max_num_seqs=3, max_model_len=64) == Limits(expected, 64, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["8", 8.0, True, None])
def test_options_have_types(value: object) -> None:
    cls = load_class("techniques.paged_attention.Paged")
    with pytest.raises(ConfigError, match=r"block_size=.*type int"):
        build_config(cls, "kv_cache", {"block_size": value})
    assert build_config(cls, "kv_cache", {"block_size": 8}).block_size == 8
    with pytest.raises(ConfigError, match="Did you mean 'block_size'"):
        build_config(cls, "kv_cache", {"block_sizes": 8})


def check_engine_serves(engine: Engine) -> None:
    (output,) = engine.generate([5, 6, 7], GREEDY)
    assert output.token_ids == hf_greedy(tiny_model("llama"), [5, 6, 7], 8)
    check_idle(engine)


def test_engine_from_python_by_name_and_technique() -> None:
    engine = build_engine(
        model=str(tiny_model("llama")),
        technique=["paged_attention", "spec_decode"],
        overrides=["engine.kv_cache.block_size=4"],
        max_num_seqs=2,
        max_model_len=64,
    )
    assert engine.parts.max_model_len == 64
    assert engine.parts.info["block_size"] == 4
    check_engine_serves(engine)


def test_engine_from_a_composed_configuration_and_from_a_resolved_one() -> None:
    composed = compose_config([f"model={tiny_model('llama')}", "+technique=paged_attention"])
    check_engine_serves(build_engine(composed.cfg, max_num_seqs=2))
    config = engine_config(composed, Limits(max_num_seqs=2), download=False)
    check_engine_serves(build_engine(config))


def test_whoever_composes_by_hand_is_checked_too() -> None:
    composed = compose_config([f"model={tiny_model('llama')}"])
    config = engine_config(composed, Limits(max_num_seqs=2), download=False)

    def changed(**components: object) -> EngineConfig:
        return dataclasses.replace(config, components={**config.components, **components})  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="Did you mean 'sampler'"):
        build_engine(changed(samplers={"_target_": "x.Y"}))
    missing = {k: v for k, v in config.components.items() if k != "loop"}
    with pytest.raises(ConfigError, match="loop"):
        build_engine(dataclasses.replace(config, components=missing))
    with pytest.raises(ConfigError, match=r"bfloat16"):
        build_engine(dataclasses.replace(config, dtype="float31"))


def test_a_technique_may_build_on_the_one_that_it_requires() -> None:
    both = compose_config(["+technique=[skinny_gemm,tuned_gemm]"])
    alone = compose_config(["+technique=skinny_gemm"])
    assert both.components["linear"] == {**alone.components["linear"], "tune_dense": True}


@pytest.mark.parametrize(
    ("names", "drafter", "verifier"),
    [
        ("rejection_sampling", "ngram", "rejection"),
        ("[draft_model,rejection_sampling]", "draft_model", "rejection"),
        ("[rejection_sampling,draft_model]", "draft_model", "rejection"),
        ("[spec_decode,eagle]", None, None),
        ("[lookahead_decoding,rejection_sampling]", None, None),
    ],
)
def test_a_technique_yields_slots_to_another_that_fills_them(
    names: str, drafter: str | None, verifier: str | None
) -> None:
    """Whatever their order; and where neither yields, they clash."""
    if drafter is None:
        with pytest.raises(ConfigError, match="both fill slot"):
            compose_config([f"+technique={names}"])
        return
    composed = compose_config([f"+technique={names}"])
    assert composed.choices["engine/drafter"] == drafter
    assert composed.choices["engine/verifier"] == verifier
    with pytest.raises(ConfigError, match="engine/verifier=exact_match was asked for"):
        compose_config([f"+technique={names}", "engine/verifier=exact_match"])


def test_yielding_a_slot_that_is_not_filled_is_an_error() -> None:
    node = {
        "summary": "s", "slots": {"drafter": "ngram"}, "yields": ["verifier"], "requires": [],
        "conflicts": [], "losslessness": "exact", "evidence": [], "paper": "p", "measure": {},
    }  # fmt: skip
    lossy = {**node, "yields": [], "losslessness": "lossy", "quality_bound": 0.1}
    assert Marker.parse("mine", lossy).quality_bound == 0.1
    for wrong in ({"quality_bound": 0}, {"losslessness": "exact"}):
        with pytest.raises(ConfigError, match="technique mine has quality_bound="):
            Marker.parse("mine", {**lossy, **wrong})
    with pytest.raises(ConfigError, match="slot that technique mine yields 'verifier'"):
        Marker.parse("mine", node)
