"""Perplexity and KL divergence: windows, sums, and logits that are those of Transformers."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.engines import check_idle, shared_engine, tiny_engine
from tests.helpers.prepared import MIXED_PREPARED
from tests.helpers.tiny_models import hf_logits, hf_model, tiny_model, tiny_tokenizer
from workbench.assemble import build_engine
from workbench.cli.eval import _rows, _with_base
from workbench.cli.main import OK, WRONG_COMMAND, main
from workbench.configuration import compose_config, engine_config, limits_of
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.models.store import ModelStoreError, resolve_model
from workbench.quality.compare import Divergence, evaluate, kl_divergence
from workbench.quality.corpus import (
    SHIPPED,
    Text,
    TokenStream,
    default_bos,
    read_text,
    tokenize,
)
from workbench.quality.perplexity import Likelihood, Window, cut_windows, token_nlls
from workbench.quality.prompt_logits import run_prompt

BOS = 1
PIECES = (
    "engine/kv_cache=paged",
    "engine/scheduler=continuous",
    "engine/prefill=chunked",
    "engine.prefill.chunk_tokens=16",
)


def stream_of(count: int, bos_id: int | None = None, seed: int = 0) -> TokenStream:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 128, (count,), generator=generator).tolist()
    return TokenStream(ids, bos_id, 0.5)


def numbered(count: int, bos_id: int | None = None) -> TokenStream:
    """Tokens that say where they stand."""
    return TokenStream(list(range(100, 100 + count)), bos_id, 1.0)


def hf_nlls(folder: Path, window: Window) -> torch.Tensor:
    """Of the scored tokens, by Transformers, shifted as its own loss shifts."""
    logits = hf_logits(folder, window.token_ids).double()
    labels = torch.tensor(window.token_ids)
    labels[: len(labels) - window.num_scored] = -100
    losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
    return losses[labels[1:] != -100]


# -- windows --------------------------------------------------------------------------------------


def test_disjoint_windows_score_all_but_the_first_token_of_each() -> None:
    windows = cut_windows(numbered(11), 4)
    assert [w.token_ids for w in windows] == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert [w.scored_ids for w in windows] == [[101, 102, 103], [105, 106, 107]]
    assert [w.first_row for w in windows] == [0, 0]


def test_a_bos_takes_a_place_and_is_not_scored() -> None:
    windows = cut_windows(numbered(7, BOS), 4)
    assert [w.token_ids for w in windows] == [[BOS, 100, 101, 102], [BOS, 103, 104, 105]]
    assert [w.scored_ids for w in windows] == [[100, 101, 102], [103, 104, 105]]


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (8, 1), (5, 4), (2, 1), (16, 8)])
def test_strided_windows_score_each_token_once(
    window: int, stride: int, bos_id: int | None
) -> None:
    windows = cut_windows(numbered(60, bos_id), window, stride)
    scored = Counter(token for w in windows for token in w.scored_ids)
    last = windows[-1].token_ids[-1]
    first = 101 if bos_id is None else 100
    assert scored == Counter(range(first, last + 1))
    assert 160 - (last + 1) < stride  # no more would have been a whole window
    for w in windows:
        assert len(w.token_ids) == window
        assert w.first_row + 1 + w.num_scored == window
    assert all(w.num_scored == min(stride, window - (bos_id is not None)) for w in windows[1:])


def test_windows_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"10 tokens, too few for one window of 16: window=10"):
        cut_windows(numbered(10), 16)
    assert len(cut_windows(numbered(10), 10)) == 1
    with pytest.raises(ConfigError, match=r"10 tokens.*window=11 would do"):
        cut_windows(numbered(10, BOS), 16)
    assert len(cut_windows(numbered(10, BOS), 11)) == 1
    with pytest.raises(ConfigError, match="nothing to score"):
        cut_windows(numbered(1), 4)
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"stride={stride} must be from 1 to window=8"):
            cut_windows(numbered(20), 8, stride)
    with pytest.raises(ConfigError, match="at least 2"):
        cut_windows(numbered(20), 1)


# -- sums -----------------------------------------------------------------------------------------


def test_sums_are_those_by_hand() -> None:
    likelihood = Likelihood()
    likelihood.add(torch.tensor([1.0, 2.0, 3.0]))
    assert likelihood.standard_error is None
    assert likelihood.perplexity_error is None
    likelihood.add(torch.tensor([5.0]))
    assert likelihood.num_tokens == 4
    assert likelihood.nats_per_token == pytest.approx(11 / 4)
    assert likelihood.perplexity == pytest.approx(math.exp(11 / 4))
    # Residuals 6 - 3 * 2.75 and 5 - 2.75.
    error = math.sqrt(2 / 1 * (2.25**2 + 2.25**2)) / 4
    assert likelihood.standard_error == pytest.approx(error)
    assert likelihood.perplexity_error == pytest.approx(error * math.exp(11 / 4))
    assert likelihood.bits_per_byte(0.25) == pytest.approx(11 / 4 / math.log(2) / 4)


def test_standard_error_of_equal_windows_is_that_of_their_means() -> None:
    draws = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    likelihood = Likelihood()
    for row in draws:
        likelihood.add(row)
    assert likelihood.standard_error == pytest.approx(float(draws.mean(1).std()) / 3)


def test_nlls_and_kl_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 5, 40, generator=generator) * 3
    ids = [3, 0, 39, 7, 7]
    wanted = F.cross_entropy(base.double(), torch.tensor(ids), reduction="none")
    assert torch.allclose(token_nlls(base, ids), wanted, atol=1e-12)
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    forward = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(base, other), forward, atol=1e-12)
    assert not torch.allclose(kl_divergence(other, base), forward, atol=1e-3)
    assert kl_divergence(base, base + 7).max() < 1e-12  # a shift changes no distribution
    ruled_out = base.clone()
    ruled_out[:, 4] = -math.inf
    assert kl_divergence(ruled_out, ruled_out).tolist() == [0.0] * 5
    assert kl_divergence(base, ruled_out).tolist() == [math.inf] * 5
    assert kl_divergence(ruled_out, base).isfinite().all()


def test_divergence_in_figures() -> None:
    divergence = Divergence([0.0, 1.0, 2.0, 3.0, 4.0], [True, True, False, True, False])
    assert (divergence.mean, divergence.maximum, divergence.agreement) == (2.0, 4.0, 0.6)
    assert divergence.percentile(75) == 3.0


# -- against Transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    ("window", "stride", "bos_id"), [(40, 40, None), (33, 33, BOS), (48, 20, None), (48, 47, BOS)]
)
@pytest.mark.parametrize("options", [(), PIECES], ids=["whole", "pieces"])
def test_every_token_is_scored_as_transformers_scores_it(
    family: str, window: int, stride: int, bos_id: int | None, options: tuple[str, ...]
) -> None:
    folder = tiny_model(family)
    engine = shared_engine(*options, model=folder, max_num_seqs=1)
    windows = cut_windows(stream_of(150, bos_id), window, stride)
    assert len(windows) > 2
    for w in windows:
        prompt = run_prompt(engine, w.token_ids[:-1])
        assert len(prompt.hidden) == window - 1
        logits = prompt.rows(w.first_row, w.first_row + w.num_scored)
        found = token_nlls(logits, w.scored_ids)
        assert torch.allclose(found, hf_nlls(folder, w), atol=1e-4)
    (evaluation,) = evaluate([engine], windows)
    check_idle(engine)
    wanted = torch.cat([hf_nlls(folder, w) for w in windows])
    assert evaluation.likelihood.num_tokens == len(wanted)
    assert evaluation.likelihood.nats_per_token == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert evaluation.divergence is None


def test_strided_perplexity_is_that_of_the_recipe_of_transformers() -> None:
    """The loop of its documentation, over a text that whole windows cover."""
    folder, window, stride = tiny_model("llama"), 32, 12
    stream = stream_of(32 + 5 * 12)
    ids, total, count, before = torch.tensor([stream.token_ids]), 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        target = ids[:, begin:end].clone()
        target[:, : -(end - before)] = -100
        with torch.inference_mode():
            loss = hf_model(folder)(ids[:, begin:end], labels=target).loss
        num_scored = int((target[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * num_scored, count + num_scored, end
        if end == ids.shape[1]:
            break
    engine = shared_engine(model=folder, max_num_seqs=1)
    (evaluation,) = evaluate([engine], cut_windows(stream, window, stride))
    assert evaluation.likelihood.num_tokens == count == len(stream.token_ids) - 1
    assert evaluation.likelihood.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_divergence_of_two_models_is_that_of_transformers() -> None:
    folders = [tiny_model("llama"), tiny_model("llama", weight_seed=1)]
    engines = [tiny_engine(model=folder, max_model_len=256) for folder in folders]
    windows = cut_windows(stream_of(450), 200)  # more rows than are made at once
    base, other = evaluate(engines, windows)
    assert base.divergence is None
    assert other.divergence is not None
    p, q = (torch.cat([hf_logits(folder, w.token_ids)[:-1] for w in windows]) for folder in folders)
    wanted = kl_divergence(p, q)
    assert torch.allclose(torch.tensor(other.divergence.kl).double(), wanted, atol=1e-4)
    assert other.divergence.mean > 0.1
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert other.divergence.agreement == pytest.approx(agreement)


def test_an_engine_that_runs_prompts_in_pieces_does_not_diverge() -> None:
    engines = [shared_engine(max_num_seqs=1), shared_engine(*PIECES, max_num_seqs=1)]
    _, pieces = evaluate(engines, cut_windows(stream_of(100), 50))
    assert [s.num_scheduled_tokens for s in engines[1].steps] == [16, 16, 16, 1] * 2
    assert pieces.divergence is not None
    assert len(pieces.divergence.kl) == 98
    assert pieces.divergence.maximum < 1e-8
    assert pieces.divergence.agreement == 1.0


def test_prepared_steps_show_what_they_computed_or_the_prompt_is_refused() -> None:
    engine = tiny_engine(*PIECES, *MIXED_PREPARED, max_num_seqs=1)
    plain = shared_engine(max_num_seqs=1)
    for length in (32, 40, 47):
        ids = stream_of(length).token_ids
        found, wanted = (run_prompt(e, ids).rows(0, length) for e in (engine, plain))
        assert torch.allclose(found, wanted, atol=1e-4)
    assert "mixed" in engine.parts.graph_runner.kinds  # type: ignore[attr-defined]
    with pytest.raises(WorkbenchError, match="Choose another window"):
        run_prompt(engine, stream_of(33).token_ids)  # its last token runs alone
    assert run_prompt(engine, stream_of(34).token_ids).hidden.shape[0] == 34
    check_idle(engine)


def test_a_prefix_cache_hides_no_token_and_no_watcher_is_left() -> None:
    cached = (*PIECES, "engine/prefix_cache=radix", "engine/eviction=lru")
    engine = tiny_engine(*cached, max_num_seqs=1)
    ids = stream_of(70).token_ids
    first, again = (run_prompt(engine, ids).hidden for _ in range(2))
    assert torch.equal(first, again)
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    assert runner.watcher is None
    with pytest.raises(WorkbenchError, match="cannot be served"):
        run_prompt(engine, [500, 501])
    assert runner.watcher is None


def test_logits_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_num_seqs=1)
    engine.parts.executor.runner.parts.model.final_norm.fill_(math.nan)  # type: ignore[attr-defined]
    with pytest.raises(WorkbenchError, match="no numbers, in window 0"):
        evaluate([engine], cut_windows(stream_of(20), 10))


def test_the_default_model_is_scored_as_transformers_scores_it() -> None:
    try:
        folder = resolve_model("smollm2-135m-instruct", download=False).path
    except ModelStoreError:
        pytest.skip("the default model is not in the store")
    composed = compose_config([f"model={folder}", "dtype=float32"])
    config = engine_config(composed, limits_of(composed.cfg, max_num_seqs=1, max_model_len=64))
    windows = cut_windows(tokenize(read_text(None), config.source.tokenizer(), 128), 64)
    (evaluation,) = evaluate([build_engine(config)], windows)
    wanted = torch.cat([hf_nlls(folder, w) for w in windows])
    assert evaluation.likelihood.num_tokens == 2 * 63
    assert evaluation.likelihood.nats_per_token == pytest.approx(float(wanted.mean()), abs=1e-4)


# -- texts ----------------------------------------------------------------------------------------


def test_the_text_that_ships_is_long_enough_for_several_windows() -> None:
    text = read_text(None)
    assert text.content == SHIPPED.read_text(encoding="utf-8")
    assert text.name == "shipped"
    assert 12_000 < len(text.content.encode()) < 17_000


def test_texts_are_read_whole(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("Zwölf\n\nBoxkämpfer.\n", encoding="utf-8")
    assert read_text(str(plain)) == Text("a.txt", "Zwölf\n\nBoxkämpfer.\n")
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    assert read_text(str(rows)).content == "one\n\ntwo"
    assert read_text(str(rows)).digest != read_text(str(plain)).digest


def test_texts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None, match: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            read_text(str(path))

    refused("a.pdf", b"text", r"must be a \.txt file")
    refused("none.txt", None, "cannot be read")
    refused("latin.txt", "ä".encode("latin-1"), "cannot be read")
    refused("empty.txt", b" \n", "holds no text")
    refused("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r'rows\.jsonl:2 .* field "text"')
    refused("list.jsonl", b"[1]\n", "no JSON object")
    refused("number.jsonl", b'{"text": 3}\n', "must be a string")
    refused("empty.jsonl", b"", "holds no text")


def test_a_stream_has_no_special_tokens_and_knows_its_density() -> None:
    tokenizer = tiny_tokenizer(128)
    stream = tokenize(Text("t", "abcé"), tokenizer)
    assert stream.token_ids == [*(4 + string.printable.index(c) for c in "abc"), 0]
    assert stream.bos_id is None
    assert stream.tokens_per_byte == pytest.approx(4 / 5)
    cut = tokenize(Text("t", "abcé"), tokenizer, 2)
    assert cut.token_ids == stream.token_ids[:2]
    assert cut.tokens_per_byte == stream.tokens_per_byte


def with_default_bos(tokenizer: Any, template: str = "<s> $A") -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_a_bos_is_one_that_the_tokenizer_puts_there_by_default() -> None:
    assert default_bos(tiny_tokenizer(128)) is None
    assert default_bos(with_default_bos(tiny_tokenizer(128))) == BOS
    assert default_bos(with_default_bos(tiny_tokenizer(128), "$A </s>")) is None
    stream = tokenize(Text("t", "ab"), with_default_bos(tiny_tokenizer(128)))
    assert (len(stream.token_ids), stream.bos_id) == (2, BOS)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(None).content[:330])
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    model = f"model={tiny_model('llama')}"
    status = main(["eval", model, "dtype=float32", *arguments, "output=json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_command_tells_figures_and_protocol(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = run_json(capsys, f"text={text_file}", "window=100", "max_tokens=310")
    assert status == OK
    protocol = document["protocol"]
    assert protocol["text"] == "text.txt"
    assert (protocol["window"], protocol["stride"], protocol["bos"]) == (100, 100, None)
    assert (protocol["num_windows"], protocol["num_tokens"]) == (3, 310)
    assert protocol["num_scored"] == 3 * 99
    (row,) = document["rows"]
    ids = tiny_tokenizer(128).encode(text_file.read_text())
    windows = cut_windows(TokenStream(ids[:310], None, 1.0), 100)
    wanted = torch.cat([hf_nlls(tiny_model("llama"), w) for w in windows])
    assert row["nats_per_token"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(float(wanted.mean()) / math.log(2), abs=1e-5)
    assert (row["name"], row["kl"], row["top1_agreement"]) == ("engine", None, None)
    assert document["engine"]["dtype"] == "float32"


def test_a_technique_stands_beside_the_engine_without_it(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = run_json(
        capsys, f"text={text_file}", "window=64", "stride=32", "+technique=continuous_batching"
    )
    base, row = document["rows"]
    assert status == OK
    assert (base["name"], row["name"]) == ("engine", "engine + continuous_batching")
    assert base["components"]["scheduler"] != row["components"]["scheduler"]
    assert row["kl"]["max"] < 1e-8
    assert row["top1_agreement"] == 1.0
    assert row["perplexity"] == pytest.approx(base["perplexity"])
    assert base["kl"] is None


def test_options_stand_beside_null_objects(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["window=64", f"text={text_file}", "engine/kv_cache=paged"]
    status, document = run_json(capsys, *options)
    assert status == OK
    assert [row["name"] for row in document["rows"]] == ["engine", "engine (kv_cache=paged)"]
    assert document["rows"][1]["kl"]["max"] < 1e-8
    _, document = run_json(capsys, *options, "against=none")
    assert [row["name"] for row in document["rows"]] == ["engine"]
    assert document["rows"][0]["components"]["kv_cache"]["_target_"].endswith("Paged")


def test_the_table_names_the_protocol(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={tiny_model('llama')}"
    arguments = [model, f"text={text_file}", "window=64", "engine/kv_cache=paged"]
    assert main(["eval", *arguments]) == OK
    out = " ".join(capsys.readouterr().out.split())
    for word in ("perplexity", "KL p99", "windows of 64 tokens, disjoint", "no BOS", "100.00"):
        assert word in out


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "kind of file": (["text=README.md"], [".txt", ".jsonl"]),
    "no file": (["text=no/such.txt"], ["no/such.txt"]),
    "window over the context": (["window=257"], ["window=257", "256 at most"]),
    "window over the limits": (["window=65", "limits.max_model_len=64"], ["64 at most"]),
    "window in words": (["window=wide"], ["window='wide'"]),
    "no window": (["window=null"], ["auto"]),
    "window of one token": (["window=1"], ["at least 2"]),
    "stride over window": (["window=32", "stride=33"], ["stride=33", "1 to window=32"]),
    "no stride": (["stride=0"], ["stride=0", "1 or more"]),
    "short text": (["window=100", "max_tokens=60"], ["60 tokens", "window=60 would do"]),
    "several windows at once": (["limits.max_num_seqs=4"], ["one at a time"]),
    "against": (["against=hf"], ["Valid: auto, base, none"]),
    "nothing to compare": (["against=base"], ["nothing to compare", "+technique="]),
    "key": (["windw=3"], ["Did you mean 'window'"]),
    "technique": (["+technique=pagd"], ["pagd"]),
    "shape without a tokenizer": (["model=llama-3.1-8b", "weights=random"], ["tokenizer"]),
}


def test_both_rows_are_of_one_device_and_serve_one_window_at_a_time() -> None:
    plan = _with_base(["+evaluation=text", f"model={tiny_model('llama')}", "preset=gpu"])
    cfg = plan.treatment.cfg
    assert cfg.limits.max_num_seqs > 1
    rows = _rows(plan, limits_of(cfg, max_num_seqs=1, max_model_len=64))
    assert [name for name, _ in rows] == ["engine", "engine (gpu)"]
    for _, config in rows:
        assert config.components["platform"]["_target_"].endswith("Cuda")
        assert (config.limits.max_num_seqs, config.limits.max_model_len) == (1, 64)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_commands_are_told(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = WRONG[case]
    model = (
        [] if any(a.startswith("model=") for a in arguments) else [f"model={tiny_model('llama')}"]
    )
    assert main(["eval", *model, *arguments]) == WRONG_COMMAND
    message = capsys.readouterr().err
    for word in words:
        assert word in message
