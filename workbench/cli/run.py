"""The main job: one command from techniques to an honest table."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from workbench.assemble import Limits, load_class
from workbench.bench.environment import hardware_slug
from workbench.bench.gates import MarginFn, Outputs
from workbench.bench.load import Offline
from workbench.bench.progress import LiveProgress
from workbench.bench.records import ResultStore
from workbench.bench.report import exit_status, print_table, to_document
from workbench.bench.roofline import measure_ceilings
from workbench.bench.run import (
    BenchSettings,
    ReferenceFn,
    Variant,
    VariantResult,
    run_bench,
)
from workbench.bench.slo import Slo
from workbench.cli.output import print_document
from workbench.cli.variants import (
    ModelForBaselines,
    Plan,
    baseline_variants,
    check_load,
    engine_variants,
    plan_run,
    with_first_baseline,
)
from workbench.configuration import engine_config, limits_of
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.workload import WorkloadRequest
from workbench.models.families import read_config, spec_from_hf
from workbench.models.random_weights import save_random_checkpoint
from workbench.models.source import ModelSource
from workbench.slots.platform import DTYPES

_REFERENCES = ("hf", "hf_scored", "base")
#: Margin in logits under which bf16 and fp16 may break a tie another way than the reference.
#: Correct bf16 runs differ: Transformers' own batched rungs part from its batch of one by margins
#: of 0.5 (the FAILED rows of results/amd-epyc_2c_2026-11-22.jsonl).
LOW_PRECISION_EPSILON = 1.0
MAX_AUTO_SEQS = 32


def run_command(overrides: Sequence[str]) -> int:
    """Run one A/B (or, without techniques, the engine beside the baselines); the exit status."""
    plan = plan_run(overrides)
    cfg = plan.treatment.cfg
    results = _run_plan(plan, overrides)
    store_file = next((r.record_file for r in results if r.record_file), None)
    figure = None
    if store_file is not None:
        from workbench.bench.figure import draw, figure_path  # matplotlib takes its time

        figure = draw(results, figure_path(store_file, results[0].record.run_id))
    if cfg.output == "json":
        print_document(to_document(results, figure=str(figure) if figure else None))
    else:
        # A file or a pipe has no width of its own; a terminal has.
        out = Console(width=None if sys.stdout.isatty() else 120)
        print_table(results, out)
        out.print(f"records: {store_file}\nfigure:  {figure}", soft_wrap=True)
    return exit_status(results)


def measure(
    overrides: Sequence[str],
    alternatives: Mapping[str, Sequence[str]] | None = None,
    command: str = "",
) -> list[VariantResult]:
    """Measure what the overrides ask for and record it, without printing a table.

    Parameters
    ----------
    alternatives
        Rows to measure in turn beside one base: by name, what each adds to the overrides, such as
        ``{"small": ["+technique=a", "engine.x.size=8"], "large": [...]}``. Each must ask for a
        technique, and all must have the same base.
    command
        What a user typed, for the records; by default the main job with these overrides.

    Raises
    ------
    WorkbenchError
        The overrides, or what they name, are wrong.
    """
    if not alternatives:
        return _run_plan(plan_run(overrides), overrides, command=command)
    plans = {name: plan_run([*overrides, *more]) for name, more in alternatives.items()}
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        if plan.base is None or first.base is None:
            raise ConfigError(f"row {name!r} asks for no technique, so it has no base.")
        if plan.base.components != first.base.components:
            raise ConfigError(
                f"row {name!r} has another base than row {next(iter(plans))!r}, so the two cannot "
                "be compared with one base row. Ask for what both require in the overrides."
            )
    return _run_plan(first, overrides, plans, command)


def _run_plan(
    plan: Plan,
    overrides: Sequence[str],
    alternatives: Mapping[str, Plan] | None = None,
    command: str = "",
) -> list[VariantResult]:
    _check_choices(plan.treatment.cfg)
    console = Console(stderr=True)
    if plan.supplied:
        console.print(f"Every engine row includes {', '.join(plan.supplied)}, which is required.")
    command = command or "python -m workbench " + shlex.join(overrides)
    return _measure(plan, command, console, alternatives or {})


def _engine_rows(plan: Plan, limits: Limits, alternatives: Mapping[str, Plan]) -> list[Variant]:
    """The engine's rows: base and treatment, or the base and each alternative under its name."""
    rows = engine_variants(plan, limits)
    if not alternatives:
        return rows
    others = {name: engine_variants(other, limits)[-1] for name, other in alternatives.items()}
    named = [dataclasses.replace(row, name=name) for name, row in others.items()]
    return [rows[0], *(dataclasses.replace(row, baseline=rows[0].name) for row in named)]


def _check_choices(cfg: DictConfig) -> None:
    for name, valid in (
        ("output", ("table", "json")),
        ("weights", ("checkpoint", "random")),
        ("dtype", ("auto", *DTYPES)),
    ):
        if cfg[name] not in valid:
            raise unknown_name(name, str(cfg[name]), valid)
    if cfg.bench.prefix_cache not in ("cold", "warm"):
        raise unknown_name("bench.prefix_cache", str(cfg.bench.prefix_cache), ("cold", "warm"))
    if cfg.bench.prefix_cache == "warm" and cfg.bench.residency == "one":
        raise ConfigError(
            "bench.prefix_cache=warm needs bench.residency=all: with one, every round builds a "
            "new, empty cache."
        )
    if cfg.bench.reference not in _REFERENCES:
        raise unknown_name("bench.reference", str(cfg.bench.reference), _REFERENCES)
    check_load(cfg)


def _measure(
    plan: Plan, command: str, console: Console, alternatives: Mapping[str, Plan]
) -> list[VariantResult]:
    cfg = plan.treatment.cfg
    slo: Slo = _build(cfg, "slo")
    # The limits are not known before the workload is, nor the workload before the model.
    source = engine_config(plan.treatment, Limits()).source
    spec = spec_from_hf(read_config(source.config))
    workload = _build(cfg, "workload")
    requests = workload.requests(
        cfg.seed, source.tokenizer(), spec.vocab_size, spec.max_position_embeddings
    )
    load_factory = _build(cfg, "load")
    limits = _limits(cfg, requests, load_factory, spec.max_position_embeddings)
    device, dtype = _device_and_dtype(plan)
    settings = _settings(cfg, dtype, slo if slo.bounds else None)
    progress = LiveProgress(console)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder_of(source, cfg, dtype, device))
        variants = _engine_rows(plan, limits, alternatives)
        reference = _engine_reference(variants)
        margin_fn: MarginFn | None = None
        if folder is not None:
            model = ModelForBaselines(folder, dtype, device)
            variants = with_first_baseline([*baseline_variants(cfg, model), *variants])
            if cfg.bench.reference != "base":
                from workbench.cli.reference import HfReference, scored

                hf = stack.enter_context(HfReference(model, requests, progress))
                if cfg.bench.reference == "hf":
                    reference = hf.outputs
                else:
                    reference = scored(reference, hf, settings.epsilon, progress)
                margin_fn = hf.margins
        return run_bench(
            variants,
            requests,
            load_factory,
            reference=reference,
            margin_fn=margin_fn,
            settings=settings,
            workload={
                "name": workload.name,
                "digest": workload.digest(requests),
                **workload.describe(),
            },
            store=ResultStore(cfg.results_dir, hardware_slug(device)),
            ceilings=measure_ceilings(device),
            progress=progress,
            command=command,
        )


def _build(cfg: DictConfig, group: str) -> Any:
    """Instantiate a workload or a load, refusing options that its class does not have."""
    node = {str(k): v for k, v in cfg[group].items()}
    valid = [
        k for k in inspect.signature(load_class(node["_target_"])).parameters if k != "requests"
    ]
    for name in node:
        if not name.startswith("_") and name not in valid:
            raise unknown_name(f"option of {group} ({node['_target_']})", name, valid)
    try:
        return instantiate(cfg[group])
    except InstantiationException as error:
        raise ConfigError(f"{group}: {error.__cause__ or error}") from error


def _limits(
    cfg: DictConfig, requests: Sequence[WorkloadRequest], load_factory: Any, context: int
) -> Limits:
    longest = max(len(r.prompt_token_ids) + r.max_tokens for r in requests)
    return limits_of(
        cfg,
        max_num_seqs=min(load_factory(requests).concurrency, MAX_AUTO_SEQS),
        max_model_len=min(-(-longest // 64) * 64, context),
    )


def _device_and_dtype(plan: Plan) -> tuple[str, str]:
    platform = plan.treatment.choices["engine/platform"]
    index = plan.treatment.cfg.engine.platform.get("index", 0)
    device = "cpu" if platform == "cpu" else f"{platform}:{index}"
    dtype = str(plan.treatment.cfg.dtype)
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return device, dtype


@contextlib.contextmanager
def _folder_of(
    source: ModelSource, cfg: DictConfig, dtype: str, device: str
) -> Iterator[Path | None]:
    """A folder with the weights that the engine runs; None where nothing else needs one.

    Random weights are written out for the other engines, drawn exactly as the engine draws them.
    """
    if cfg.weights == "checkpoint":
        yield source.folder
        return
    if not len(cfg.baselines) and cfg.bench.reference == "base":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="workbench-random-") as parent:
        yield save_random_checkpoint(
            read_config(source.config),
            Path(parent) / "model",
            seed=cfg.seed,
            dtype=DTYPES[dtype],
            device=device,
        )


def _engine_reference(variants: Sequence[Variant]) -> ReferenceFn:
    """Outputs of the first engine row, for models that no other engine can hold beside ours."""
    first = next(v for v in variants if v.kind == "engine")

    def outputs(requests: Sequence[WorkloadRequest]) -> Outputs:
        backend = first.build()
        found: dict[str, list[int]] = {r.request_id: [] for r in requests}
        failed: set[str] = set()

        def on_event(event: TokenEvent) -> None:
            found[event.request_id] += event.token_ids
            if event.error is not None:
                failed.add(event.request_id)

        load = Offline(requests)
        try:
            # Watched, so that who follows another starts when it would in a measured row.
            backend.run(load, load.watch(on_event))
        finally:
            backend.close()
        return {name: tuple(ids) for name, ids in found.items() if name not in failed}

    return outputs


def _settings(cfg: DictConfig, dtype: str, slo: Slo | None = None) -> BenchSettings:
    bench = cfg.bench
    epsilon = bench.epsilon
    if epsilon == "auto":
        epsilon = 0.0 if dtype == "float32" else LOW_PRECISION_EPSILON
    rounds_for = {} if bench.baseline_rounds is None else {"baseline": int(bench.baseline_rounds)}
    try:
        return BenchSettings(
            rounds=int(bench.rounds),
            rounds_for=rounds_for,
            warmup=bench.warmup,
            epsilon=float(epsilon),
            timeout_s=bench.timeout_s,
            residency=bench.residency,
            slo=slo,
            seed=int(cfg.seed),
        )
    except (ValueError, TypeError) as error:
        given = OmegaConf.to_yaml(bench).strip().replace("\n", ", ")
        raise ConfigError(f"bench: {error} Given: {given}.") from error
