"""``list``, ``doctor`` and ``--cfg``."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.assemble import EngineConfig, Limits, build_component, build_engine
from workbench.bench.environment import collect_environment
from workbench.bench.roofline import measure_ceilings
from workbench.cli.output import print_document, takes_json
from workbench.configuration import CONF_DIR, Marker, compose_config, load_markers, options_of
from workbench.core.errors import WorkbenchError, unknown_name
from workbench.models.families import read_config
from workbench.models.source import ModelSource
from workbench.slots.platform import Platform

#: Optional libraries and what they are for.
OPTIONAL = {
    "numba": "fast CPU kernels",
    "triton": "GPU kernels",
    "flash_attn": "attention backend",
    "flashinfer": "attention backend",
    "vllm": "baseline (may live in an environment of its own: baseline.vllm.python)",
    "pynvml": "GPU driver and memory figures",
}


#: Shape of a model of a size that every attention backend knows; its weights are drawn.
_TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,  # for the drafter that asks for one
}


def list_command(arguments: Sequence[str]) -> int:
    """Show every technique with its slots, requirements, losslessness class and paper."""
    as_json, rest = takes_json(list(arguments))
    if rest:
        raise unknown_name("argument of list", rest[0], ["output=json"])
    markers = load_markers()
    if as_json:
        print_document(
            [
                {
                    "name": m.name,
                    "slots": list(m.slots),
                    "requires": list(m.requires),
                    "conflicts": list(m.conflicts),
                    "reconciles": list(m.reconciles),
                    "losslessness": m.losslessness,
                    "paper": m.paper,
                    "summary": m.summary,
                    "evidence": list(m.evidence),
                }
                for m in markers.values()
            ]
        )
        return 0
    table = Table(title="techniques: python -m workbench +technique=NAME", show_lines=True)
    for column, wrap in (("technique", True), ("slot=option", True), ("what it is", False)):
        table.add_column(column, no_wrap=wrap, overflow="fold")
    for m in markers.values():
        notes = [m.summary, f"[dim]{m.losslessness}; {m.paper}[/dim]"]
        if m.requires:
            notes.append("requires " + ", ".join(r.replace("|", " or ") for r in m.requires))
        if m.conflicts:
            notes.append(f"conflicts with {', '.join(m.conflicts)}")
        if m.reconciles:
            notes.append(f"lifts conflicts with {', '.join(m.reconciles)}")
        slots = "\n".join(f"{slot}={option}" for slot, option in m.slots.items())
        table.add_row(m.name, slots, "\n".join(notes))
    Console().print(table)
    return 0


def doctor_command(arguments: Sequence[str]) -> int:
    """Say what this machine can run and why not, and measure its ceilings.

    A technique can run where a tiny engine with it can be built.
    """
    as_json, rest = takes_json(list(arguments))
    refresh = "refresh=true" in rest
    rest = [text for text in rest if text not in ("refresh=true", "refresh=false")]
    if rest:
        raise unknown_name("argument of doctor", rest[0], ["output=json", "refresh=true"])
    document = _diagnose(refresh)
    if as_json:
        print_document(document)
    else:
        _print_diagnosis(document)
    return 0


def _diagnose(refresh: bool) -> dict[str, Any]:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    print("measuring copy bandwidth and matmul rates ...", file=sys.stderr)
    ceilings = measure_ceilings(device, refresh=refresh)
    print("building a tiny engine with each technique ...", file=sys.stderr)
    return {
        "schema": 1,
        "environment": collect_environment(device).to_dict(),
        "platforms": {name: _platform_reasons(name) for name in options_of("engine/platform")},
        "libraries": {
            name: {"installed": importlib.util.find_spec(name) is not None, "for": use}
            for name, use in OPTIONAL.items()
        },
        "techniques": _all_technique_reasons(device.partition(":")[0]),
        "ceilings": ceilings.to_dict(),
    }


def _platform_reasons(name: str) -> list[str]:
    """Why a platform cannot be used here; empty when it can."""
    platform: Platform = build_component("platform", _node_of("platform", name))
    return platform.unsupported_reasons()


def _all_technique_reasons(platform: str) -> dict[str, list[str]]:
    """Why each technique cannot be used here; empty when it can."""
    bare = compose_config([f"engine/platform={platform}"]).components
    read_config(_TINY_MODEL)  # imports what every engine needs
    gc.freeze()  # every engine collects garbage, and need not look at libraries each time
    try:
        markers = load_markers()
        return {name: _technique_reasons(name, markers, bare) for name in markers}
    finally:
        gc.unfreeze()


def _technique_reasons(
    name: str, markers: Mapping[str, Marker], bare: Mapping[str, dict[str, Any]]
) -> list[str]:
    """Why an engine with a technique cannot be built, in the engine's words."""
    names = [name]
    while missing := [entry for n in names for entry in markers[n].lacking(names)]:
        names.append(missing[0])
    chosen = [(slot, option) for n in names for slot, option in markers[n].slots.items()]
    try:
        build_engine(
            EngineConfig(
                components={**bare, **{slot: _node_of(slot, option) for slot, option in chosen}},
                source=ModelSource("tiny", _TINY_MODEL, "random"),
                weights="random",
                dtype="bfloat16",
                limits=Limits(max_num_seqs=2, max_model_len=128),
            )
        )
    except WorkbenchError as error:
        return [str(error)]
    except Exception as error:  # a library that is broken
        return [f"{type(error).__name__}: {error}"]
    return []


def _node_of(slot: str, option: str) -> dict[str, Any]:
    """``_target_`` and options of a slot's option."""
    node = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "engine" / slot / f"{option}.yaml"))
    assert isinstance(node, dict)
    if node.get("hf_config", 0) is None:  # of another model, which a user has to name
        node["hf_config"] = _TINY_MODEL
    return {str(key): value for key, value in node.items()}


def _print_diagnosis(document: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="what this machine can run", show_header=False)
    table.add_column("what")
    table.add_column("state", overflow="fold")
    for key in ("platforms", "techniques"):
        for name, reasons in document[key].items():
            table.add_row(
                f"{key.removesuffix('s')} {name}",
                "[red]no[/red]: " + escape("; ".join(reasons)) if reasons else "[green]yes[/green]",
            )
    for name, state in document["libraries"].items():
        mark = "[green]yes[/green]" if state["installed"] else "not installed"
        table.add_row(f"library {name}", f"{mark} ({state['for']})")
    console.print(table)
    ceilings = document["ceilings"]
    measured = Table(title=f"measured ceilings of {ceilings['device']}", show_header=False)
    measured.add_row("copy bandwidth (read + write)", f"{ceilings['copy_bytes_s'] / 1e9:,.1f} GB/s")
    measured.add_row("read bandwidth", f"{ceilings['read_bytes_s'] / 1e9:,.1f} GB/s")
    for name, rate in ceilings["matmul_flops"].items():
        measured.add_row(f"matmul {name}", f"{rate / 1e12:,.3f} TFLOP/s")
    console.print(measured)
    for name, value in document["environment"].items():
        console.print(f"[dim]{name}:[/dim] {value}", soft_wrap=True)


def config_command(arguments: Sequence[str]) -> int:
    """Print the composed configuration."""
    as_json, rest = takes_json(list(arguments))
    cfg = compose_config(rest).cfg
    if as_json:
        print_document(OmegaConf.to_container(cfg, resolve=True))
    else:
        print(OmegaConf.to_yaml(cfg), end="")
    return 0
