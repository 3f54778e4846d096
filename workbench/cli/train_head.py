"""``train_head``: a draft head for a model, trained on text that the model writes itself."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from workbench.assemble import build_engine
from workbench.bench.environment import collect_environment
from workbench.cli.nodes import build_node, compose_with_one
from workbench.cli.output import print_document, takes_json
from workbench.cli.prompts import read_prompts, write_own_prompts
from workbench.configuration import (
    Composed,
    engine_config,
    limits_of,
)
from workbench.core.errors import ConfigError
from workbench.models.families import read_config, spec_from_hf
from workbench.slots.platform import DTYPES

#: Name of the record in a head's folder.
RECORD_FILE = "training.json"
#: Requests at once while the target writes, where the limits say auto.
_WRITING_SEQS = 64


def train_head_command(arguments: Sequence[str]) -> int:
    """Train and save a head; the exit status."""
    began = time.monotonic()
    as_json, arguments = takes_json(list(arguments))
    command = "python -m workbench train_head " + shlex.join(arguments)
    composed, kind = compose_with_one("train_head", arguments, "kind", "head", "+training=head")
    record, folder = train_head(composed, kind, command, began)
    if as_json:
        print_document({"schema": 1, "folder": str(folder), **record})
    else:
        figures = record["held_out"]
        print(
            f"head: {folder}\nrecord: {folder / RECORD_FILE}\n"
            "mean accepted length on held-out text: "
            f"{figures['trained']['mean_accepted_length']:.3f} "
            f"(untrained {figures['untrained']['mean_accepted_length']:.3f})"
        )
    return 0


def train_head(
    composed: Composed, kind: str, command: str, began: float
) -> tuple[dict[str, Any], Path]:
    """Write the text, train the head, save both head and record.

    Parameters
    ----------
    began
        ``time.monotonic()`` from which ``max_minutes`` counts.

    Returns
    -------
    The record and the head's folder.
    """
    cfg = composed.cfg
    trainee, program = build_node(cfg, "head"), build_node(cfg, "training")
    budget_s = _budget_s(cfg)
    seed = int(cfg.seed)
    source = engine_config(composed, limits_of(cfg, max_num_seqs=1, max_model_len=1)).source
    context = spec_from_hf(read_config(source.config)).max_position_embeddings
    longest = _longest(cfg, context)
    files, num_own = _files(cfg), _num_own_prompts(cfg)
    room = longest - program.options.max_tokens
    prompts: list[list[int]] = []
    if files or not num_own:
        prompts = read_prompts(
            files, source.tokenizer(), longest=room, count=cfg.num_prompts, seed=seed
        )
    limits = limits_of(cfg, max_num_seqs=_WRITING_SEQS, max_model_len=longest)
    folder = Path(cfg.out or f"results/local/heads/{Path(source.name).name}-{kind}")
    if (folder / RECORD_FILE).exists():
        raise ConfigError(f"{folder} holds a head already: remove it, or choose another out=.")
    engine = build_engine(engine_config(composed, limits))
    device, info = engine.parts.info["device"], dict(engine.parts.info)
    decoder = engine.parts.executor.runner.parts.model  # type: ignore[attr-defined]
    if num_own:
        # Half of the time for writing; the answers take the other half.
        share = None if budget_s is None else 0.5 * program.options.writing_share * budget_s
        own = write_own_prompts(
            engine,
            longest=room,
            count=num_own,
            seed=seed,
            chunk_size=4 * info["max_num_seqs"],
            may_go_on=lambda: share is None or time.monotonic() - began < share,
        )
        _say(f"prompts: {len(own)} of {num_own} of the model's own")
        prompts, num_own = prompts + own, len(own)
    corpus = program.write(engine, prompts, seed, began, budget_s, _say)
    written = time.monotonic()
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trained = program.train(decoder, trainee, corpus, seed, source.name, began, budget_s, _say)
    dtype = DTYPES[info["dtype"]]
    program.save(trained, folder, dtype)
    record = {
        "command": command,
        "kind": kind,
        "model": source.name,
        "seed": seed,
        "config": {
            name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("head", "training")
        },
        "max_minutes": cfg.max_minutes,
        "data": {
            "files": files or ([] if num_own else "shipped"),
            "num_own_prompts": num_own,
            "digest": _digest(prompts),
            "num_prompts": len(prompts),
            **program.describe(corpus),
        },
        **program.results(trained),
        "seconds": {
            "writing": written - began,
            **trained.seconds,
            "total": time.monotonic() - began,
        },
        "engine": {k: info[k] for k in ("dtype", "device", "attention", "max_num_seqs")},
        "environment": collect_environment(device).to_dict(),
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record, folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _files(cfg: DictConfig) -> list[str]:
    if cfg.data is None:
        return []
    return [cfg.data] if isinstance(cfg.data, str) else [str(name) for name in cfg.data]


def _num_own_prompts(cfg: DictConfig) -> int:
    count = cfg.num_own_prompts
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ConfigError(f"num_own_prompts={count!r} must be a number of prompts, 0 or more.")
    return count


def _budget_s(cfg: DictConfig) -> float | None:
    minutes = cfg.max_minutes
    if minutes is None:
        return None
    if not isinstance(minutes, int | float) or isinstance(minutes, bool) or minutes <= 0:
        raise ConfigError(f"max_minutes={minutes!r} must be null (no limit) or a number over 0.")
    return 60.0 * minutes


def _longest(cfg: DictConfig, context: int) -> int:
    """Tokens of the longest text: as the limits say, or four answers' length."""
    given, answer = cfg.limits.max_model_len, cfg.training.max_tokens
    longest = min(context, 4 * answer) if given == "auto" else int(given)
    if longest <= answer:
        raise ConfigError(
            f"limits.max_model_len={longest} leaves no room for a prompt before an answer of "
            f"training.max_tokens={answer} tokens."
        )
    return longest


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(list(prompt)).encode())
    return digest.hexdigest()
