"""What the pages say is so: what they name exists, what they tell to do works."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.helpers.engines import (
    TECHNIQUES,
    check_idle,
    needed_settings,
    node_of,
    tiny_engine,
    why_not_here,
)
from tests.helpers.pages import (
    GUIDE,
    REPO,
    TEMPLATE,
    class_members,
    code_spans,
    commands,
    contents,
    copy_of_repository,
    forget_modules,
    install_template,
    page_id,
    section,
    source_text,
    source_words,
    table_rows,
    use_tree,
)
from tests.helpers.tiny_models import tiny_model
from workbench import configuration
from workbench.assemble import SLOTS, load_class
from workbench.bench.gates import Verdict
from workbench.bench.metrics import METRICS
from workbench.bench.records import STATUSES, Record
from workbench.cli import run as cli_run
from workbench.cli.main import _COMMANDS
from workbench.cli.variants import plan_run
from workbench.configuration import compose_config, load_markers
from workbench.core.sampling import SamplingParams
from workbench.models.store.catalog import find_entry
from workbench.slots.component import Component

TEMPLATE_README = REPO / "techniques" / "_template" / "README.md"
#: Pages that speak of the template as if it were copied.
TEMPLATE_PAGES = {GUIDE, TEMPLATE_README}
ARCHITECTURE = REPO / "docs" / "architecture.md"
KEYS_HEADING = "3. The marker: `conf/technique/<name>.yaml`"
PAGES = sorted(
    {
        *REPO.glob("*.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("results/*.md"),
        *REPO.glob("techniques/*/README.md"),
        *REPO.glob("workbench/**/README.md"),
    }
)
HEADINGS = (
    "Paper",
    "Slot and options",
    "Losslessness",
    "Evidence",
    "Requires and conflicts",
    "Limits",
    "Measure it",
)
_PATH_SUFFIXES = {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".ipynb"}
_PLACEHOLDER = re.compile(r"<|\.\.\.|\b(NAME|FILE|A,B|A B)\b")


@pytest.fixture(scope="module")
def template_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_of_repository(tmp_path_factory.mktemp("tree"))
    install_template(tree, TEMPLATE)
    return tree


@pytest.fixture
def with_template(template_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The copied template as a technique of ``conf/``."""
    use_tree(monkeypatch, template_tree)
    yield template_tree
    forget_modules(TEMPLATE)


@pytest.fixture
def root(request: pytest.FixtureRequest, page: Path) -> Path:
    """Where a page's paths and options are looked up."""
    return request.getfixturevalue("with_template") if page in TEMPLATE_PAGES else REPO


# -- what pages name ------------------------------------------------------------------------------


def is_path(span: str) -> bool:
    if not re.fullmatch(r"[\w.\-<>*/]+", span) or "=" in span:
        return False
    return (
        (REPO / span.split("/")[0]).exists() if "/" in span else Path(span).suffix in _PATH_SUFFIXES
    )


def check_path(span: str, root: Path) -> None:
    if span.startswith("results/local"):  # made by a run
        return
    pattern = re.sub(r"<[^>]*>", "*", span).rstrip("/")
    found = [hit for base in (root, REPO) for hit in base.glob(pattern)]
    assert found, f"there is no {span}"
    assert not span.endswith("/") or any(hit.is_dir() for hit in found), f"{span} is no folder"


def check_name(span: str) -> None:
    """A module, a ``Class.member`` or a word of the sources."""
    name = re.sub(r"\(\)$|\[.*\]$", "", span)
    head, _, last = name.rpartition(".")
    if name.split(".")[0] in {"workbench", "techniques", "kernels", "experiments"}:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(head), last), f"there is no {name}"
    elif re.fullmatch(r"[A-Z]\w*[a-z]\w*", head):
        assert last in class_members().get(head, set()), f"there is no {name}"
    else:
        missing = [word for word in name.split(".") if word and word not in source_words()]
        assert not missing, f"{span}: no source says {missing}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_names_exists(page: Path, root: Path) -> None:
    for span in code_spans(page.read_text()):
        if is_path(span):
            check_path(span, root)
        elif re.fullmatch(r"[+~]*[\w./@]+=[\w./,\[\]-]+", span):
            compose_config([span])
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(\)|\[[\w +,]*\])?", span):
            check_name(span)
        elif re.fullmatch(r"--?\w[\w-]*", span):
            assert re.search(rf"(?<![\w-]){span}(?![\w-])", source_text()), f"no option {span}"


def check_workbench_command(arguments: list[str]) -> None:
    if arguments and arguments[0] in _COMMANDS:
        if arguments[0] == "fetch" and not arguments[1].startswith("-"):
            assert find_entry(arguments[1]), f"fetch does not know {arguments[1]}"
        if arguments[0] == "eval":
            plan_run(["+evaluation=text", *arguments[1:]])
        return
    is_sweep = "-m" in arguments
    overrides = [text for text in arguments if text not in ("-m", "--cfg")]
    assert all("=" in text for text in overrides), arguments
    if not is_sweep:
        plan_run(overrides)
        return
    for text in overrides:
        key, _, values = text.partition("=")
        for value in values.split(","):
            plan_run([f"{key}={value}"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_a_page_are_right(page: Path, root: Path) -> None:
    for line in commands(page.read_text()):
        words = shlex.split(line)
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (REPO / "Makefile").read_text()
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make has no {target}"
            continue
        module, arguments = words[2], words[3:]
        if module == "workbench":
            if not _PLACEHOLDER.search(line):
                check_workbench_command(arguments)
            continue
        assert importlib.util.find_spec(module), f"there is no module {module}"
        for argument in arguments:
            if "/" in argument and "=" not in argument:
                check_path(argument, root)
            elif re.fullmatch(r"\w+=[\w/]+", argument):
                compose_config([argument])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_to_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def test_the_checks_can_fail() -> None:
    for span in (
        "workbench/slots/nothing.py",
        "techniques/<name>/NOTHING.md",
        "docs/architecture/",
    ):
        assert is_path(span)
        with pytest.raises(AssertionError):
            check_path(span, REPO)
    for name in ("Scheduler.plan_ahead", "workbench.slots.policy.Nobody", "no_such_word_anywhere"):
        with pytest.raises(AssertionError):
            check_name(name)
    with pytest.raises(ValueError, match="technique"):
        check_workbench_command(["+technique=nothing"])
    assert len(PAGES) > len(TECHNIQUES) + 4
    assert any("+technique=" in line for page in PAGES for line in commands(page.read_text()))


def test_local_results_are_ignored() -> None:
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    ignored = subprocess.run(
        ["git", "check-ignore", "results/local/x.jsonl", "results/x.jsonl"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout.split() == ["results/local/x.jsonl"]
    assert compose_config([]).cfg.results_dir == "results/local"


# -- tables that repeat the code ------------------------------------------------------------------


def test_table_of_slots_is_that_of_the_code() -> None:
    rows = {row[0]: row for row in table_rows(section(ARCHITECTURE.read_text(), "Slots"))}
    assert list(rows) == [f"`{slot}`" for slot in SLOTS]
    choices = compose_config([]).choices
    for slot in SLOTS:
        module = importlib.import_module(f"workbench.slots.{slot}")
        interface = next(
            name
            for name, cls in inspect.getmembers(module, inspect.isclass)
            if cls.__module__ == module.__name__
            and issubclass(cls, Component)
            and inspect.isabstract(cls)
        )
        option = choices[f"engine/{slot}"]
        null_object = load_class(node_of(slot, option)["_target_"]).__name__
        row = rows[f"`{slot}`"]
        assert (row[1], row[3]) == (f"`{interface}`", f"`{null_object}`, option `{option}`")


def test_rooms_may_import_what_the_import_test_lets_them() -> None:
    from tests.unit.test_architecture import MAY_IMPORT

    checked = 0
    for room, _, allowed in table_rows(section(ARCHITECTURE.read_text(), "Rooms")):
        names = set(re.findall(r"`([^`]+)`", allowed))
        module = room.strip("`").removesuffix(".py").rstrip("/").replace("/", ".")
        if "all of the above" in allowed or module not in MAY_IMPORT or "the same" in allowed:
            continue
        assert names == MAY_IMPORT[module] - {"workbench"}, room
        checked += 1
    assert checked == 12


def test_what_nothing_calls_is_called_by_nothing() -> None:
    page = ARCHITECTURE.read_text()
    paragraph = page[page.index("nothing calls") : page.index("yet. The")]
    names = re.findall(r"`(\w+)\.(\w+)`", paragraph)
    assert names
    engine = [
        path for room in ("slots", "engine") for path in (REPO / "workbench" / room).glob("*.py")
    ]
    text = "".join(
        path.read_text() for path in [*engine, *(REPO / "workbench/models").glob("*.py")]
    )
    for _, method in names:
        calls = re.findall(rf"(?<!def )\b\w+\.{method}\(", text)
        assert not calls, f"{calls} is called, docs/architecture.md says that it is not"
    assert re.findall(r"(?<!def )\b\w+\.rotate_and_write\(", text), "the search finds nothing"


def test_page_on_records_names_every_field_status_verdict_and_metric() -> None:
    text = (REPO / "docs" / "records.md").read_text()
    named = {
        name
        for row in table_rows(section(text, "What a record holds"))
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert named == {"record_id", *(item.name for item in fields(Record))}
    statuses = {row[0].strip("`") for row in table_rows(section(text, "Status"))}
    assert statuses == set(STATUSES)
    verdicts = {row[0].strip("`") for row in table_rows(section(text, "Verdict"))}
    assert verdicts == set(get_args(Verdict))
    metrics = {tuple(row[:3]) for row in table_rows(section(text, "Metrics"))}
    assert metrics == {(f"`{m.name}`", m.unit, m.better) for m in METRICS.values()}


# -- READMEs of techniques ------------------------------------------------------------------------


def readme_of(name: str) -> str:
    path = TEMPLATE_README if name == TEMPLATE else REPO / "techniques" / name / "README.md"
    assert path.is_file(), f"technique {name} has no README"
    return path.read_text()


@pytest.fixture
def marker(request: pytest.FixtureRequest, name: str) -> configuration.Marker:
    if name == TEMPLATE:
        request.getfixturevalue("with_template")
    return load_markers()[name]


ALL_NAMES = (*TECHNIQUES, TEMPLATE)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_readme_says_what_the_marker_and_the_options_say(
    name: str, marker: configuration.Marker
) -> None:
    text = readme_of(name)
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADINGS
    assert section(text, "Losslessness").strip().startswith(f"`{marker.losslessness}`")
    slots = section(text, "Slot and options")
    options: dict[str, Any] = {}
    for slot, option in marker.slots.items():
        assert {f"`{slot}`", f"`{option}`"} <= set(re.findall(r"`\w+`", slots))
        options |= {k: v for k, v in node_of(slot, option).items() if k != "_target_"}
    stated = {row[0].strip("`"): row[1] for row in table_rows(slots)}
    assert stated == {key: str(value) for key, value in options.items()}
    counters = {row[0].strip("`") for row in table_rows(section(text, "Evidence"))}
    assert counters == set(marker.evidence)
    relations = section(text, "Requires and conflicts")
    required = [name for entry in marker.requires for name in entry.split("|")]
    for other in (*required, *marker.conflicts):
        assert f"`{other}`" in relations
    assert marker.requires or "Requires nothing" in relations
    paper = section(text, "Paper")
    assert "https://" in paper
    for identifier in re.findall(r"arXiv:(\d{4}\.\d{5})", marker.paper):
        assert f"https://arxiv.org/abs/{identifier}" in paper


@pytest.mark.parametrize("name", ALL_NAMES)
def test_readme_states_no_speed(name: str) -> None:
    text = re.sub(r"`[^`]*`|https?://\S+", "", readme_of(name))
    assert not re.findall(r"\d\s?[x%](?!\w)|\d\s*(?:tok/s|times faster)", text)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_measuring_command_of_a_readme_passes_its_gates(
    name: str, marker: configuration.Marker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model, and against the engine alone: the command must show what it is for."""
    found = commands(section(readme_of(name), "Measure it"))
    assert len(found) == 1
    overrides = shlex.split(found[0])[3:]
    assert overrides[0] == f"+technique={name}"
    if name != TEMPLATE and (reason := why_not_here(name)):
        pytest.skip(reason)
    monkeypatch.setattr(cli_run, "measure_ceilings", lambda device: None)
    model = tiny_model("llama", max_position_embeddings=4096)
    smaller = [f"model={model}", "dtype=float32"]
    if name in ("eagle", "eagle_tree"):  # untrained heads are right where tokens repeat
        smaller.append("weights=random")
    elif "weights=random" not in overrides:
        smaller += needed_settings([name], model)
    # Where tokens may differ, a model of its own must say by how much.
    reference = "base" if marker.quality_bound is None else "hf"
    smaller += ["baselines=[]", f"bench.reference={reference}", "bench.rounds=1", "bench.warmup=0"]
    smaller += {
        "code_edit": ["workload.num_requests=1", "workload.apply_chat_template=false"],
        "mixed": ["workload.max_output_len=40"],
        "chat": ["workload.num_requests=2", "workload.max_tokens=40"],
    }.get(marker.measure["workload"], [])
    if marker.slots.get("attention") == "flex":  # not compiled on a CPU
        smaller += ["workload.num_requests=4"]
    results = cli_run.measure([*overrides, *smaller, f"results_dir={tmp_path}"])
    records = [result.record for result in results]
    verdicts = [(r.status, r.verdict, r.error) for r in records]
    if marker.losslessness == "lossy" and marker.quality_bound is None:  # is not trusted
        assert verdicts[0] == ("OK", "exact", None)
        assert (verdicts[1][1], "losslessness 'lossy'" in str(verdicts[1][2])) == ("INVALID", True)
        return
    assert verdicts == [("OK", "exact", None), ("OK", marker.losslessness, None)]
    assert set(records[1].techniques) == {*marker.lacking([]), name}
    assert set(records[0].techniques) == set(marker.lacking([]))
    assert all(records[1].evidence[counter] > 0 for counter in marker.evidence)


# -- the six steps --------------------------------------------------------------------------------


def test_template_is_no_technique_until_it_is_copied() -> None:
    assert TEMPLATE not in load_markers()
    assert (REPO / "techniques" / "_template" / "conf").is_dir()


@pytest.mark.parametrize("name", [TEMPLATE, "my_policy"])
def test_copying_the_template_only_adds_files_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = copy_of_repository(tmp_path)
    before = contents(tree)
    install_template(tree, name)
    after = contents(tree)
    assert {path: after.get(path) for path in before} == before
    assert {path for path in after.keys() - before.keys() if "__pycache__" not in path} == {
        f"techniques/{name}/README.md",
        f"techniques/{name}/__init__.py",
        f"techniques/{name}/policy.py",
        f"conf/engine/policy/{name}.yaml",
        f"conf/technique/{name}.yaml",
    }
    use_tree(monkeypatch, tree)
    composed = compose_config([f"+technique={name}"])
    cls = load_class(composed.components["policy"]["_target_"])
    assert cls.__module__ == f"techniques.{name}.policy"
    assert Path(inspect.getfile(cls)).is_relative_to(tree)
    assert composed.techniques[name].slots == {"policy": name}
    forget_modules(name)


def test_guide_shows_the_files_of_the_template(with_template: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    paths = (f"engine/policy/{TEMPLATE}", f"technique/{TEMPLATE}")
    for path, block in zip(paths, blocks, strict=True):
        written = (with_template / "conf" / f"{path}.yaml").read_text()
        # The marker's remark on `measure` is the one thing that the page leaves out.
        assert re.sub(r"  # unless .*", "", written) == block
    keys = {row[0].strip("`") for row in table_rows(section(GUIDE.read_text(), KEYS_HEADING))}
    assert keys == configuration._MARKER_KEYS | configuration._OPTIONAL_KEYS


def test_copied_template_meets_the_contract_of_its_slot(with_template: Path) -> None:
    from tests.contract.test_strategies import TestPolicy
    from tests.unit.test_architecture import test_option_s_file_says_what_its_class_says

    suite = TestPolicy()
    names = [name for name in dir(suite) if name.startswith("test_")]
    assert names
    for name in names:
        getattr(suite, name)(TEMPLATE)
    test_option_s_file_says_what_its_class_says("policy", TEMPLATE)


def test_copied_template_reorders_requests_and_changes_no_token(with_template: Path) -> None:
    lengths = [30, 8, 19, 19, 3]
    prompts = [list(range(5, 5 + n)) for n in lengths]
    ended: dict[str, list[int]] = {}
    tokens: dict[str, dict[int, list[int]]] = {}
    for row, chosen in (("base", []), ("copied", [TEMPLATE])):
        engine = tiny_engine(techniques=chosen, max_num_seqs=1)
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)
            engine.add_request(prompt, sampling, str(index))
        ended[row], tokens[row] = [], {}
        while engine.has_unfinished():
            for output in engine.step():
                if output.finished:
                    ended[row].append(int(output.request_id))
                    tokens[row][int(output.request_id)] = output.token_ids
        check_idle(engine)
    assert ended["base"] == list(range(len(prompts)))
    assert ended["copied"] == sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    assert tokens["copied"] == tokens["base"]
    shorter = sum(n < max(lengths[:i], default=0) for i, n in enumerate(lengths))
    assert engine.counters()["policy.overtakes"] == shorter
    engine.reset_counters()
    assert engine.counters()["policy.overtakes"] == 0


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_copied_template_refuses_a_bad_option(with_template: Path, value: str) -> None:
    with pytest.raises(ValueError, match="bucket_tokens"):
        tiny_engine(f"engine.policy.bucket_tokens={value}", techniques=[TEMPLATE])
