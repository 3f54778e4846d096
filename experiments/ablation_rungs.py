"""The rungs of Transformers beside an ablation: one request, on the weights of the engine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments import peak
from workbench.assemble import EngineConfig, load_class
from workbench.bench.load import Offline
from workbench.configuration import Composed
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError, UnsupportedError, unknown_name
from workbench.core.workload import WorkloadRequest
from workbench.models.families import read_config
from workbench.models.random_weights import random_tensors
from workbench.slots.platform import DTYPES


def options_of_rung(composed: Composed, name: str) -> dict[str, Any]:
    """Class and options of a rung of ``conf/baseline``.

    Raises
    ------
    ConfigError
        There is no such rung, or it is no model of Transformers in this process.
    """
    if name not in composed.cfg.baseline:
        raise unknown_name("baseline", name, [str(k) for k in composed.cfg.baseline])
    node = OmegaConf.to_container(composed.cfg.baseline[name], resolve=True)
    assert isinstance(node, dict)
    options = {str(k): v for k, v in node.items() if k != "_convert_"}
    if not str(options["_target_"]).startswith("workbench.baselines.hf_generate."):
        raise ConfigError(
            f"baseline {name!r} is not model.generate in this process; valid here: hf_naive, "
            "hf_compiled, hf_static_batch. `python -m workbench` measures the others."
        )
    return options


@contextlib.contextmanager
def rung(options: dict[str, Any], config: EngineConfig, dtype: str, device: str) -> Iterator[Any]:
    """A rung with the engine's own random weights, drawn on the device; no file holds them."""
    options = dict(options)
    cls = load_class(options.pop("_target_"))
    hf_config = read_config(config.source.config)
    with tempfile.TemporaryDirectory(prefix="workbench-config-") as folder:
        hf_config.save_pretrained(folder)
        backend = cls(
            model_path=Path(folder),
            dtype=dtype,
            device=device,
            weights="random",
            seed=config.seed,
            **options,
        )
    try:
        # The library draws others from the same seed, and then no output could be compared.
        held = backend.shared.model.state_dict()
        with torch.no_grad():
            for name, tensor in random_tensors(hf_config, config.seed, DTYPES[dtype], device):
                held[name].copy_(tensor)
        del held
        yield backend
    finally:
        backend.close()
        del backend
        if options.get("compile"):
            torch._dynamo.reset()  # compiled code holds graphs, and those their memory
        peak.free_memory()


def serve(backend: Any, requests: Sequence[WorkloadRequest]) -> tuple[float, list[list[int]]]:
    """Seconds from the first request in to the last token out, and each request's tokens.

    The clock starts when the rung asks for requests: it tidies its memory before.
    """
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last_s = 0.0

    def on_event(event: TokenEvent) -> None:
        nonlocal last_s
        if event.error is not None:
            raise UnsupportedError(f"{backend.name}: {event.error}")
        found[event.request_id] += event.token_ids
        last_s = event.time_s

    load = Offline(requests)
    backend.run(load, load.watch(on_event))
    assert load.start_s is not None
    return last_s - load.start_s, list(found.values())


def measure_rung(
    backend: Any,
    options: dict[str, Any],
    requests: Sequence[WorkloadRequest],
    expected: Sequence[Any],
    rounds: int,
    epsilon: float,
) -> dict[str, Any]:
    """Check a rung's outputs and time it.

    Parameters
    ----------
    expected
        The eager engine's outputs of ``requests``, with log-probabilities.

    Returns
    -------
    What a row of the engine has, as far as a rung has it.

    Raises
    ------
    UnsupportedError
        Compilation was asked for, and Transformers did not compile.
    """
    warmup_s = []
    # A compiled model compiles in the first run and records its graphs in the second.
    for _ in range(2 if options.get("compile") else 1):
        seconds, _tokens = serve(backend, requests)
        warmup_s.append(round(seconds, 3))
    if options.get("compile") and getattr(backend.shared.model, "_compiled_call", None) is None:
        raise UnsupportedError(
            f"{backend.name}: Transformers does not compile on {backend.shared.device}."
        )
    runs = [serve(backend, requests) for _ in range(rounds)]
    checks = [
        peak.compare([SimpleNamespace(token_ids=ids) for ids in tokens], expected, epsilon)
        for _, tokens in runs
    ]
    check = max(checks, key=lambda c: (not c.passed, c.ties))
    output = sum(request.max_tokens for request in requests)
    row = {"check": asdict(check), "backend": asdict(backend.info()), "warmup_s": warmup_s}
    if not check.passed:
        return {**row, "status": "FAILED", "reason": "its tokens differ from the core's"}
    return {
        **row,
        "status": "ok",
        "metric": "output_tok_s",
        "values": [round(output / wall, 2) for wall, _ in runs],
        "wall_s": [round(wall, 4) for wall, _ in runs],
        "output_tokens": output,
        "total_tokens": output + sum(len(r.prompt_token_ids) for r in requests),
        "counters": backend.counters(),
    }
