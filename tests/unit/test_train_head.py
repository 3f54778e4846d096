"""``train_head``: heads learn from text that a tiny model writes; drafts with them are exact."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from techniques.draft_heads import load_head
from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.heads import tiny_target
from tests.helpers.tiny_models import tiny_model
from workbench.cli.main import WRONG_COMMAND, main
from workbench.cli.prompts import read_prompts, write_own_prompts
from workbench.core.errors import ConfigError
from workbench.core.outputs import CompletionOutput, RequestOutput
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far", "from", "big", "red", "dogs"]
SMALL = (
    "limits.max_model_len=96",
    "training.max_tokens=40",
    "training.samples_per_prompt=2",
    "training.batch_tokens=256",
    "training.held_out_fraction=0.3",
    "training.epochs=12",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def counting_model() -> Path:
    """The tiny Llama, but after a token mostly comes the one with the next id: a head that has
    learnt nothing is wrong, and one that learns is soon right."""
    source = tiny_model("llama")
    folder = Path(tempfile.mkdtemp(prefix="counting-", dir=source.parent))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    state = load_file(source / "model.safetensors")
    embedding = state["model.embed_tokens.weight"].mul_(400)
    rows = torch.arange(embedding.shape[0])
    state["lm_head.weight"] = embedding[(rows - 1).clamp(min=0)] * 0.01
    state["lm_head.weight"][4] = embedding[-1] * 0.01
    state["lm_head.weight"][:4] = 0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every shape that is read."""
    rows: list[dict[str, Any]] = []
    for index in range(24):
        text = " ".join([*(WORDS[index * k % len(WORDS)] for k in (1, 3, 7)), chr(97 + index)])
        rows.append(
            [
                {"prompt": text},
                {"question": text},
                {"turns": [text, "and?"]},
                {"messages": [{"role": "user", "content": text}]},
            ][index % 4]
        )
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def heads(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a trained head of each kind, made by the command."""
    torch.set_num_threads(1)
    parent = tmp_path_factory.mktemp("heads")
    model = counting_model()
    for kind in ("medusa", "eagle", "eagle3"):
        more = ["head.token_weight=1.0"] if kind == "eagle" else ["head.draft_vocab_size=100"]
        if kind == "medusa":
            more += ["training.learning_rate=0.01"]
        arguments = [f"kind={kind}", f"model={model}", f"data={data}", f"out={parent / kind}"]
        assert main(["train_head", *arguments, *SMALL, *more]) == 0
    return {kind: parent / kind for kind in ("medusa", "eagle", "eagle3")}


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
def test_a_head_learns_and_its_record_is_whole(kind: str, heads: dict[str, Path]) -> None:
    record = json.loads((heads[kind] / "training.json").read_text())
    losses = [entry["loss"] for entry in record["losses"]]
    assert losses[-1] < losses[0] - 0.1  # most of it is the target's own entropy
    figures = record["held_out"]
    assert figures["trained"]["num_places"] == figures["untrained"]["num_places"] > 20
    trained, untrained = (figures[k]["mean_accepted_length"] for k in ("trained", "untrained"))
    assert trained > untrained + 0.1
    accepted = figures["trained"]["accepted_at"]
    assert accepted == sorted(accepted, reverse=True)
    assert trained == pytest.approx(1 + sum(accepted))
    assert record["command"].startswith(f"python -m workbench train_head kind={kind} ")
    assert (record["kind"], record["seed"], record["stopped_early"]) == (kind, 0, False)
    assert record["num_steps"] == record["losses"][-1]["step"]
    assert record["data"]["num_prompts"] == 24
    assert record["data"]["num_texts"] == 2 * 17
    assert record["data"]["num_held_out_texts"] == 7
    assert record["config"]["training"]["epochs"] == 12
    assert record["environment"]["packages"]["torch"]
    seconds = record["seconds"]
    assert seconds["total"] >= seconds["writing"] + seconds["training"] > 0
    target = tiny_target(counting_model())
    loaded = load_head(heads[kind], target.spec)
    assert loaded.spec.kind == kind
    assert loaded.spec.draft_vocab_size == (128 if kind == "eagle" else 100)


def test_greedy_tokens_with_trained_heads_are_those_without(heads: dict[str, Path]) -> None:
    model = counting_model()
    prompts = mixed_prompts(6)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    plain = tiny_engine(model=model).generate(prompts, sampling)
    head = f"engine.drafter.head={heads['medusa']}"
    engine = tiny_engine(head, techniques=["medusa"], model=model)
    drafted = engine.generate(prompts, sampling)
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    counters = engine.counters()
    assert counters["verifier.accepted_tokens"] > 0
    assert counters["drafter.drafted_tokens"] >= counters["verifier.verified_tokens"] - 3 * 6
    assert counters["drafter.failures"] == 0
    assert engine.parts.ledger.prediction.held["drafter"] > 0
    check_idle(engine)


def test_random_heads_are_drawn_by_the_seed_and_drafts_with_them_are_exact() -> None:
    prompts = mixed_prompts(4)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    plain = tiny_engine("weights=random").generate(prompts, sampling)
    drafted = {}
    for seed in (0, 0, 1):
        engine = tiny_engine("weights=random", f"seed={seed}", techniques=["medusa"])
        outputs = engine.generate(prompts, sampling)
        drafter = engine.parts.components["drafter"]
        weight = drafter._heads.get_submodule("0.0.linear").weight  # type: ignore[attr-defined]
        assert torch.equal(drafted.setdefault(seed, weight), weight)
        if seed == 0:
            assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
            assert engine.counters()["drafter.drafted_tokens"] > 0
    assert not torch.equal(drafted[0], drafted[1])


def test_heads_that_cannot_serve_are_errors_that_say_what_to_do(heads: dict[str, Path]) -> None:
    model = counting_model()
    for head, message in (
        ("null", r"not set.*train_head kind=medusa"),
        (heads["eagle"], r"kind eagle, not Medusa"),
        ("/nowhere", r"/nowhere/config\.json cannot be read"),
        (f"{heads['medusa']} engine.drafter.num_draft_tokens=9", r"over the 4 heads"),
    ):
        overrides = f"engine.drafter.head={head}".split(" ")
        with pytest.raises(ValueError, match=message):
            tiny_engine(*overrides, techniques=["medusa"], model=model)
    with pytest.raises(ValueError, match="was trained for"):
        tiny_engine(f"engine.drafter.head={heads['medusa']}", techniques=["medusa"])


def test_training_ends_in_time_and_saves(data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    out = tmp_path / "head"
    arguments = [f"model={counting_model()}", f"data={data}", f"out={out}"]
    arguments += [*SMALL, "training.epochs=100000", "max_minutes=0.05"]
    assert main(["train_head", "kind=medusa", *arguments]) == 0
    assert time.monotonic() - began < 20
    record = json.loads((out / "training.json").read_text())
    assert record["stopped_early"]
    assert load_head(out).spec.kind == "medusa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one kind=: eagle, eagle3, medusa"),
        (["kind=meduza"], "Did you mean 'medusa'"),
        (["kind=eagle", "head.num_heads=3"], "num_heads"),
        (["kind=medusa", "head.num_heads=many"], "must be of type int"),
        (["kind=medusa", "head.num_heads=0"], "must be 1 or more"),
        (["kind=medusa", "training.epochs=0"], "training.epochs=0 must be 1 or more"),
        (["kind=medusa", "max_minutes=0"], "max_minutes=0 must be null"),
        (["kind=medusa", "limits.max_model_len=40"], "no room for a prompt"),
        (["kind=medusa", "data=/nowhere.jsonl"], "cannot be read"),
        (["kind=medusa", "num_own_prompts=-1"], "num_own_prompts=-1 must be a number of prompts"),
        (["kind=medusa", "num_own_prompts=few"], "num_own_prompts='few' must be a number"),
    ],
)
def test_wrong_commands(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model={tiny_model('llama')}"
    assert main(["train_head", model, "training.max_tokens=40", *arguments]) == WRONG_COMMAND
    assert message in capsys.readouterr().err


def test_prompts_of_every_shape(data: Path, tmp_path: Path) -> None:
    from tests.helpers.tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer(128)
    prompts = read_prompts([str(data)], tokenizer, longest=96, count=None, seed=0)
    texts = {tokenizer.decode(ids) for ids in prompts}
    assert len(texts) == 24
    assert all(text.startswith("user: ") and text.endswith("assistant: ") for text in texts)
    assert read_prompts([str(data)], tokenizer, longest=96, count=5, seed=0) == prompts[:5]
    plain = tmp_path / "a.txt"
    plain.write_text(" ".join(WORDS * 10))
    passages = read_prompts([str(plain)], tokenizer, longest=900, count=None, seed=0)
    whole = sorted((tokenizer.decode(ids) for ids in passages), key=len)
    assert [len(text.split()) for text in whole] == [10, 60, 60]
    assert read_prompts([], tokenizer, longest=4000, count=10, seed=0)
    for name, text, message in (
        ("b.jsonl", '{"other": 1}', "b.jsonl:1 has none of messages"),
        ("c.jsonl", "{", "c.jsonl:1 is not JSON"),
        ("d.csv", "x", "neither .jsonl nor .txt"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_prompts([str(tmp_path / name)], tokenizer, longest=96, count=None, seed=0)
    with pytest.raises(ConfigError, match="hold 24 prompts"):
        read_prompts([str(data)], tokenizer, longest=96, count=25, seed=0)


class Writer:
    """Stands for an engine whose answers are given, in turn."""

    def __init__(self, answers: list[tuple[str, FinishReason]]) -> None:
        from tests.helpers.tiny_models import tiny_tokenizer

        self.tokenizer: Any = tiny_tokenizer(128)
        self._answers, self.openings = answers, list[str]()

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> list[RequestOutput]:
        assert len({p.seed for p in params}) == len(params)
        self.openings += [self.tokenizer.decode(ids) for ids in prompts]
        outputs = []
        for index, prompt in enumerate(prompts):
            text, reason = self._answers[(len(self.openings) + index) % len(self._answers)]
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            made = CompletionOutput(0, ids, text, reason)
            outputs.append(RequestOutput(str(index), prompt, [made], True))
        return outputs


def test_a_model_writes_prompts_of_its_own() -> None:
    """Different ones that it ended and that fit, after the template's opening of a question."""
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    answers = [("the cat", stop), ("a mat", stop), ("sat on", length), ("", stop)]
    answers.append(("dogs " * 40, stop))
    writer: Any = Writer(answers)
    prompts = write_own_prompts(writer, longest=60, count=2, seed=0)
    texts = sorted(writer.tokenizer.decode(ids) for ids in prompts)
    assert texts == ["user: a mat\nassistant: ", "user: the cat\nassistant: "]
    assert set(writer.openings) == {"user: "}
    with pytest.raises(ConfigError, match=r"2 have an end within .* num_own_prompts=3"):
        write_own_prompts(writer, longest=60, count=3, seed=0)
    # Out of time: what is there by then.
    hurried: Any = Writer(answers)
    few = write_own_prompts(
        hurried, longest=60, count=9, seed=0, chunk_size=5, may_go_on=lambda: False
    )
    assert len(few) == 2 and len(hurried.openings) == 5
    writer.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        write_own_prompts(writer, longest=60, count=2, seed=0)


def test_a_head_learns_from_prompts_of_its_own_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of the shipped ones, or beside those of files."""
    own = [[5 + i, 6, 7, 8 + i] for i in range(6)]
    monkeypatch.setattr("workbench.cli.train_head.write_own_prompts", lambda engine, **_: own)
    arguments = ["kind=eagle3", f"model={counting_model()}", "num_own_prompts=6"]
    small = [*SMALL, "training.epochs=1", "head.draft_vocab_size=100", "training.kept_states_gib=0"]
    assert main(["train_head", *arguments, f"out={tmp_path / 'head'}", *small]) == 0
    record = json.loads((tmp_path / "head" / "training.json").read_text())
    assert record["data"]["num_prompts"] == record["data"]["num_own_prompts"] == 6
    assert record["data"]["files"] == []
