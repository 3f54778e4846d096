"""Every technique, experiment and preset of ``conf`` composes, builds and runs.

Through the command's own path (plan, variants, backend), on a tiny random model on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, needed_settings, why_not_here
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits
from workbench.bench.load import LoadGenerator, Offline
from workbench.bench.workloads.base import Workload
from workbench.cli.variants import engine_variants, plan_run
from workbench.configuration import options_of
from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest
from workbench.engine.backend import EngineBackend

GROUPS = {"technique": "+technique", "experiment": "+experiment", "preset": "preset"}


def recipes() -> Iterator[str]:
    for group, key in GROUPS.items():
        yield from (f"{key}={name}" for name in options_of(group))


def on_a_tiny_model(recipe: str) -> list[str]:
    model = tiny_model("llama")
    return [
        recipe,
        "engine/platform=cpu",
        "model=smollm2",  # the group's option without a shape of its own
        f"model.name={model}",
        *needed_settings([recipe.partition("=")[2]], model),
        "weights=checkpoint",
    ]


def requests() -> list[WorkloadRequest]:
    rng = random.Random(0)
    return [
        WorkloadRequest(
            f"r{i}",
            tuple(rng.choices(range(FIRST_ORDINARY_ID, VOCAB_SIZE), k=4 + 9 * i)),
            max_tokens=4 + i,
        )
        for i in range(4)
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_composes_builds_and_runs(recipe: str) -> None:
    key, _, name = recipe.partition("=")
    names = [name] if key == "+technique" else plan_run([recipe]).treatment.techniques
    reason = next((found for name in names if (found := why_not_here(name))), None)
    if reason is not None:
        assert "cannot be used" in reason or "not installed" in reason, (
            "no reason a user could act on"
        )
        pytest.skip(reason)
    plan = plan_run(on_a_tiny_model(recipe))
    variants = engine_variants(plan, Limits(max_num_seqs=3, max_model_len=64))
    assert variants
    assert variants[-1].techniques.keys() == plan.treatment.techniques.keys()
    for variant in variants:
        backend = variant.build()
        assert isinstance(backend, EngineBackend)
        events: list[TokenEvent] = []
        backend.run(Offline(requests()), events.append)
        assert not [e.error for e in events if e.error]
        produced = {r.request_id: 0 for r in requests()}
        for event in events:
            produced[event.request_id] += len(event.token_ids)
        assert produced == {r.request_id: r.max_tokens for r in requests()}
        counters = backend.counters()
        assert counters["step.steps"] >= 3
        assert counters["step.num_output_tokens"] == sum(produced.values())
        for name, marker in variant.techniques.items():
            missing = [key for key in marker["evidence"] if key not in counters]
            assert not missing, f"{name} promises counters that nothing counts: {missing}"
        ledger = backend.memory()
        assert ledger is not None
        assert ledger.predicted["kv_pool"] > 0
        backend.engine.check_integrity()
        backend.close()


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_names_a_workload_a_load_and_baselines_that_exist(recipe: str) -> None:
    cfg = plan_run([recipe]).treatment.cfg
    workload = instantiate(cfg.workload)
    assert isinstance(workload, Workload)
    load = instantiate(cfg.load)(requests())
    assert isinstance(load, LoadGenerator)
    assert load.concurrency >= 1
    assert set(cfg.baselines) <= set(cfg.baseline)
    for slot, node in cfg.engine.items():
        assert "_target_" in node, f"slot {slot} is empty"
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, name) for group in ("workload", "load") for name in options_of(group)],
)
def test_every_workload_and_load_composes(group: str, option: str) -> None:
    """Each once: neither group's options read the other's."""
    plan = plan_run([f"{group}={option}"])
    assert plan.base is None
    assert plan.treatment.choices[group] == option


@pytest.mark.parametrize("model", options_of("model"))
def test_every_model_composes(model: str) -> None:
    plan = plan_run([f"model={model}"])
    assert plan.treatment.cfg.model.name
