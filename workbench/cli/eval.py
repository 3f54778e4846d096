"""``eval``: perplexity of what the engine computes, and its distance from a base."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from workbench.assemble import EngineConfig, Limits, build_engine, check_engine
from workbench.bench.environment import collect_environment
from workbench.bench.jsonsafe import plain
from workbench.cli.output import print_document, takes_json
from workbench.cli.variants import ENGINE, Plan, engine_rows, plan_run, row_config
from workbench.configuration import compose_config, engine_config, limits_of
from workbench.core.errors import ConfigError, unknown_name
from workbench.models.families import read_config, spec_from_hf
from workbench.quality.compare import Evaluation, evaluate
from workbench.quality.corpus import TokenStream, read_text, tokenize
from workbench.quality.perplexity import Window, cut_windows

_AGAINST = ("auto", "base", "none")
#: Tokens of a window, where the configuration says auto. The text that ships is short: with smaller
#: windows there are enough for a standard error.
_WINDOW, _WINDOW_OF_SHIPPED = 2048, 512


@dataclasses.dataclass(frozen=True, slots=True)
class Protocol:
    """What was evaluated, so that figures can be compared.

    Attributes
    ----------
    bos
        The token that begins each window, as text; None where there is none.
    num_tokens, num_scored
        Of the text, as far as it was used at all; those that were scored.
    """

    text: str
    text_sha256: str
    window: int
    stride: int
    bos: str | None
    num_windows: int
    num_tokens: int
    num_scored: int
    tokens_per_byte: float

    def describe(self) -> list[str]:
        """In sentences, for people."""
        if self.stride == self.window:
            way = "disjoint"
        else:
            way = f"one every {self.stride} tokens, of which the last {self.stride} are scored"
        bos = "no BOS, so the first token of a window is not scored" if self.bos is None else ""
        if self.bos is not None:
            bos = f"each begins with BOS {self.bos!r}, as the tokenizer does by default"
        return [
            f"Text {self.text}, sha256 {self.text_sha256[:16]}, one stream of tokens without chat "
            f"template; {self.num_windows} windows of {self.window} tokens, {way}; {bos}.",
            f"{self.num_scored} of {self.num_tokens} tokens scored; perplexity is exp of the mean "
            "nats a token; ± is the standard error over windows; bits a byte by "
            f"{self.tokens_per_byte:.4f} tokens a byte.",
            "KL is that of the row from the first row, in nats a token over the whole vocabulary; "
            "top-1 is how often both rank the same token first. Sums in float64.",
        ]


def eval_command(arguments: Sequence[str]) -> int:
    """Evaluate what the overrides ask for; the exit status."""
    as_json, rest = takes_json(list(arguments))
    command = shlex.join(["python", "-m", "workbench", "eval", *arguments])
    for text in rest:
        if text.lstrip("+").startswith("limits.max_num_seqs="):
            raise ConfigError(f"{text} has no effect here: windows are served one at a time.")
    plan = _with_base(["+evaluation=text", *rest])
    cfg = plan.treatment.cfg
    source = engine_config(plan.treatment, limits_of(cfg, max_num_seqs=1, max_model_len=1)).source
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ConfigError(
            f"model {source.name} has no tokenizer, so no text can be read with it: name a model "
            "folder with a tokenizer.json."
        )
    corpus = read_text(None if cfg.text is None else str(cfg.text))
    context = spec_from_hf(read_config(source.config)).max_position_embeddings
    window = _window(cfg, context)
    stride = _number(cfg, "stride") or window
    stream = tokenize(corpus, tokenizer, _number(cfg, "max_tokens"))
    windows = cut_windows(stream, window, stride)
    rows = _rows(plan, limits_of(cfg, max_num_seqs=1, max_model_len=window))
    for _, config in rows:
        check_engine(config)
    engines = []
    for name, config in rows:
        _say(f"building {name}")
        engines.append(build_engine(config))
    found = evaluate(engines, windows, lambda done, of: _say(f"window {done} of {of}"))
    bos = None if stream.bos_id is None else tokenizer.convert_ids_to_tokens(stream.bos_id)
    protocol = _protocol(corpus.name, corpus.digest, window, stride, bos, stream, windows)
    results = {name: _figures(one, protocol) for (name, _), one in zip(rows, found, strict=True)}
    if as_json or cfg.output == "json":
        info = engines[-1].parts.info
        document = {
            "schema": 1,
            "command": command,
            "model": source.name,
            "protocol": protocol,
            "rows": [
                {"name": name, **results[name], "components": config.components}
                for name, config in rows
            ],
            "engine": {k: info[k] for k in ("weights", "dtype", "device", "attention")},
            "environment": collect_environment(info["device"]).to_dict(),
        }
        print_document(plain(document))
    else:
        _print_table(source.name, engines[-1].parts.info["dtype"], results, protocol)
    return 0


def _with_base(overrides: Sequence[str]) -> Plan:
    """The plan of a run, with a base of null objects where only options were chosen."""
    plan = plan_run(overrides)
    against = str(plan.treatment.cfg.against)
    if against not in _AGAINST:
        raise unknown_name("against", against, _AGAINST)
    if against == "none":
        return dataclasses.replace(plan, base=None)
    if plan.base is None:
        kept = [text for text in overrides if not re.match(r"[+~]*(engine[/.]|preset=)", text)]
        kept += [text for text in overrides if re.match(r"\+*engine[/.]platform\b", text)]
        base = compose_config(kept)
        if base.components != plan.treatment.components:
            return dataclasses.replace(plan, base=base)
        if against == "base":
            raise ConfigError(
                "against=base has nothing to compare: the engine is the base. Add +technique=NAME "
                "or an option such as engine/linear=NAME."
            )
    return plan


def _rows(plan: Plan, limits: Limits) -> list[tuple[str, EngineConfig]]:
    """Name and configuration of each engine, base first.

    All are of the treatment's device, since precision goes by it, and serve one window at a time,
    whatever number of requests a preset or a technique is measured with.
    """
    limits = dataclasses.replace(limits, max_num_seqs=1)
    rows = []
    for name, composed in engine_rows(plan):
        config = row_config(plan, composed, limits)
        platform = plan.treatment.components["platform"]
        components = {**config.components, "platform": platform}
        rows.append((name, dataclasses.replace(config, components=components)))
    if plan.base is not None and not plan.treatment.techniques:
        rows[1] = (f"{ENGINE} ({_choices(plan)})", rows[1][1])
    return rows


def _choices(plan: Plan) -> str:
    """Options of the treatment that the base has not."""
    assert plan.base is not None
    ours, base = plan.treatment, plan.base
    parts = []
    for slot, node in ours.components.items():
        if node == base.components[slot]:
            continue
        option = ours.choices[f"engine/{slot}"]
        if option != base.choices[f"engine/{slot}"]:
            parts.append(f"{slot}={option}")
        else:
            other = base.components[slot]
            parts += [f"{slot}.{k}={v}" for k, v in node.items() if other.get(k) != v]
    return ", ".join(parts)


def _window(cfg: DictConfig, context: int) -> int:
    """Tokens of a window, within the context of the model and the limits."""
    limit = cfg.limits.max_model_len
    if isinstance(limit, int) and not isinstance(limit, bool) and 0 < limit < context:
        context = limit
    if cfg.window == "auto":
        return min(_WINDOW_OF_SHIPPED if cfg.text is None else _WINDOW, context)
    window = _number(cfg, "window")
    if window is None:
        raise ConfigError("window=null must be auto or a number of tokens.")
    if window > context:
        raise ConfigError(f"window={window} is over the model's context: {context} at most.")
    return window


def _number(cfg: DictConfig, name: str) -> int | None:
    value = cfg[name]
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a number of tokens, 1 or more.")
    return value


def _protocol(
    name: str,
    digest: str,
    window: int,
    stride: int,
    bos: str | None,
    stream: TokenStream,
    windows: Sequence[Window],
) -> Protocol:
    return Protocol(
        text=name,
        text_sha256=digest,
        window=window,
        stride=stride,
        bos=bos,
        num_windows=len(windows),
        num_tokens=len(stream.token_ids),
        num_scored=sum(w.num_scored for w in windows),
        tokens_per_byte=stream.tokens_per_byte,
    )


def _figures(evaluation: Evaluation, protocol: Protocol) -> dict[str, Any]:
    """A row's figures by name; those of the divergence are None where there is no base."""
    likelihood, divergence = evaluation.likelihood, evaluation.divergence
    figures: dict[str, Any] = {
        "perplexity": likelihood.perplexity,
        "perplexity_standard_error": likelihood.perplexity_error,
        "nats_per_token": likelihood.nats_per_token,
        "nats_standard_error": likelihood.standard_error,
        "bits_per_byte": likelihood.bits_per_byte(protocol.tokens_per_byte),
        "kl": None,
        "top1_agreement": None,
    }
    if divergence is not None:
        figures["kl"] = {
            "mean": divergence.mean,
            "p99": divergence.percentile(99),
            "max": divergence.maximum,
        }
        figures["top1_agreement"] = divergence.agreement
    return figures


def _print_table(
    model: str, dtype: str, results: dict[str, dict[str, Any]], protocol: Protocol
) -> None:
    # A file or a pipe has no width of its own; a terminal has.
    out = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"quality of {model} · {dtype}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("row")
    headers = ("perplexity", "nats a\ntoken", "bits a\nbyte")
    if len(results) > 1:
        headers += ("KL mean", "KL p99", "KL max", "top-1\n%")  # type: ignore[assignment]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in results.items():
        error = row["perplexity_standard_error"]
        cells = [
            f"{row['perplexity']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            f"{row['nats_per_token']:.5f}",
            f"{row['bits_per_byte']:.5f}",
        ]
        if row["kl"] is not None:
            cells += [f"{row['kl'][k]:.3g}" for k in ("mean", "p99", "max")]
            cells.append(f"{100 * row['top1_agreement']:.2f}")
        elif len(results) > 1:
            cells += ["-"] * 4
        table.add_row(name, *cells)
    out.print(table)
    lines = protocol.describe()
    for line in lines if len(results) > 1 else lines[:-1]:
        out.print(f"  {line}", markup=False, highlight=False)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
