"""The vLLM backend and its worker, against a stand-in for the vllm package.

The real worker runs in a real subprocess; only the package that it imports is a stand-in, whose
n-th output token is the sum of the prompt plus n.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from workbench.baselines.vllm_backend import VllmBackend
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.workload import WorkloadRequest

VOCAB_SIZE = 1000
CONTEXT = 64
EOS = 7
CONFIG = Path(__file__).parents[2] / "conf" / "baseline" / "vllm.yaml"

STAND_IN = """
import dataclasses, os, types
from types import SimpleNamespace

__version__ = "9.9.9"
print("a library that prints to stdout")


@dataclasses.dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    stop_token_ids: list
    detokenize: bool
    output_kind: str


class EngineArgs(SimpleNamespace):
    pass


class LLMEngine:
    def __init__(self, args):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert args.skip_tokenizer_init
        if args.dtype == "float16":
            raise ValueError("no float16 on this stand-in")
        self.args, self.waiting, self.running, self.cached = args, [], {}, 0
        layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "STAND_IN_ATTN"))
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=args.max_model_len),
            cache_config=SimpleNamespace(num_gpu_blocks=11, block_size=16),
            compilation_config=SimpleNamespace(static_forward_context={"0": layer}),
        )

    @classmethod
    def from_engine_args(cls, args):
        return cls(args)

    def reset_prefix_cache(self):
        self.cached = 0

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def add_request(self, request_id, prompt, params):
        ids = prompt["prompt_token_ids"]
        assert params.temperature == 0.0 and params.output_kind == "DELTA"
        if ids[0] == 666:
            raise ValueError("the engine does not like 666")
        self.running[request_id] = [ids, params, 0]

    def step(self):
        print("a step")
        results = []
        for request_id, state in list(self.running.items()):
            ids, params, count = state
            if ids[0] == 999:
                raise RuntimeError("the engine broke on 999")
            token = (sum(ids) + count) % 1000
            state[2] += 1
            finished = state[2] >= params.max_tokens or token in params.stop_token_ids
            if finished:
                del self.running[request_id]
            output = SimpleNamespace(token_ids=[token])
            results.append(
                SimpleNamespace(request_id=request_id, outputs=[output], finished=finished)
            )
        return results
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that finds the stand-in, as one of another environment finds vLLM."""
    root = tmp_path_factory.mktemp("vllm_env")
    package = root / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "platforms.py").write_text(
        "from types import SimpleNamespace\ncurrent_platform = SimpleNamespace(device_type='cpu')\n"
    )
    (package / "sampling_params.py").write_text(
        "from types import SimpleNamespace\nRequestOutputKind = SimpleNamespace(DELTA='DELTA')\n"
    )
    script = root / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{root / "site"}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, "eos_token_id": 3}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    return path


@pytest.fixture(scope="module")
def shared_backend(python: Path, folder: Path) -> Iterator[VllmBackend]:
    backend = VllmBackend(folder, python=python)
    yield backend
    backend.close()


class Source:
    """A closed load: at most ``concurrency`` in flight."""

    def __init__(self, requests: list[WorkloadRequest], concurrency: int | None = None) -> None:
        self.pending = list(requests)
        self.concurrency = concurrency or len(requests)

    def poll(self, now_s: float, num_in_flight: int) -> list[WorkloadRequest]:
        room = max(0, self.concurrency - num_in_flight)
        out, self.pending = self.pending[:room], self.pending[room:]
        return out

    def next_due_s(self) -> float | None:
        return None

    @property
    def exhausted(self) -> bool:
        return not self.pending


def make_requests(shapes: list[tuple[int, int]], **fields: Any) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(f"r{index}", (first, 1), max_tokens, **fields)
        for index, (first, max_tokens) in enumerate(shapes)
    ]


def expected(request: WorkloadRequest) -> list[int]:
    return [(sum(request.prompt_token_ids) + n) % VOCAB_SIZE for n in range(request.max_tokens)]


def run(
    backend: VllmBackend, requests: list[WorkloadRequest], concurrency: int | None = None
) -> tuple[dict[str, list[int]], list[TokenEvent]]:
    events: list[TokenEvent] = []
    backend.run(Source(requests, concurrency), events.append)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for event in events:
        tokens[event.request_id].extend(event.token_ids)
    return tokens, events


def test_tokens_events_and_times(shared_backend: VllmBackend) -> None:
    requests = make_requests([(10, 5), (20, 1), (30, 9)])
    for _ in range(2):
        start = time.perf_counter()
        tokens, events = run(shared_backend, requests)
        end = time.perf_counter()
        assert tokens == {r.request_id: expected(r) for r in requests}
        for request in requests:
            mine = [event for event in events if event.request_id == request.request_id]
            assert [e.finished for e in mine] == [False] * (request.max_tokens - 1) + [True]
            times = [e.time_s for e in mine]
            assert times == sorted(times)
            # The worker's clock is this process's clock.
            assert start < times[0] <= times[-1] < end


def test_a_closed_load_is_never_a_step_late(shared_backend: VllmBackend) -> None:
    requests = make_requests([(10, 3), (20, 5), (30, 4), (40, 2), (50, 6), (60, 1)])
    concurrency = 2
    tokens, _ = run(shared_backend, requests, concurrency)
    assert tokens == {r.request_id: expected(r) for r in requests}
    # A place that falls free is filled before the next step.
    free_at = [0] * concurrency
    for request in requests:
        place = free_at.index(min(free_at))
        free_at[place] += request.max_tokens
    counters = shared_backend.counters()
    assert counters["steps"] == max(free_at)
    assert counters["output_tokens"] == sum(r.max_tokens for r in requests)
    assert counters["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in requests)
    assert counters["wasted_tokens"] == counters["padded_prompt_tokens"] == 0


def test_end_of_sequence_comes_from_the_generation_config(shared_backend: VllmBackend) -> None:
    # The prompt sums to 4, so the tokens are 4, 5, 6, 7 (the end), 8.
    (kept,) = make_requests([(3, 5)])
    (ended,) = make_requests([(3, 5)], ignore_eos=False)
    assert run(shared_backend, [kept])[0]["r0"] == expected(kept)
    assert run(shared_backend, [ended])[0]["r0"] == [4, 5, 6, EOS]


def test_requests_that_cannot_be_served_are_told(shared_backend: VllmBackend) -> None:
    good = make_requests([(10, 3), (20, 2)])
    bad = {
        "empty": ((), 1, "prompt is empty"),
        "long": ((1,) * CONTEXT, 1, f"context holds {CONTEXT}"),
        "vocabulary": ((VOCAB_SIZE,), 1, "outside the vocabulary"),
        "refused": ((666,), 1, "does not like 666"),
    }
    requests = [good[0], *(WorkloadRequest(n, p, m) for n, (p, m, _) in bad.items()), good[1]]
    tokens, events = run(shared_backend, requests, concurrency=1)
    for name, (_, _, reason) in bad.items():
        (event,) = [e for e in events if e.request_id == name]
        assert event.finished
        assert reason in (event.error or "")
    assert [tokens[r.request_id] for r in good] == [expected(r) for r in good]
    assert shared_backend.counters()["failed_requests"] == len(bad)


def test_info_and_memory(shared_backend: VllmBackend, python: Path) -> None:
    run(shared_backend, make_requests([(10, 3)]))
    info = shared_backend.info()
    assert info.version.startswith("vllm 9.9.9")
    assert info.attention == "STAND_IN_ATTN"
    assert info.details["python"] == str(python)
    assert info.details["max_model_len"] == CONTEXT
    ledger = shared_backend.memory()
    assert ledger is not None
    assert ledger.kv_allocated_tokens == 11 * 16
    assert ledger.base_bytes > 0


def test_an_engine_that_breaks_is_named_with_its_last_words(python: Path, folder: Path) -> None:
    backend = VllmBackend(folder, python=python)
    try:
        with pytest.raises(ConfigError, match="the engine broke on 999") as caught:
            run(backend, make_requests([(999, 3)]))
        assert ", in step" in str(caught.value), "the end of the traceback is not quoted"
        with pytest.raises(RuntimeError, match="closed"):
            run(backend, make_requests([(10, 3)]))
    finally:
        backend.close()


def test_an_engine_that_does_not_start_is_named(python: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no float16 on this stand-in"):
        VllmBackend(folder, python=python, dtype="float16")


def test_a_failing_listener_ends_the_worker(python: Path, folder: Path) -> None:
    backend = VllmBackend(folder, python=python)
    process = backend._open_process._process

    def fail(event: TokenEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.run(Source(make_requests([(10, 50)])), fail)
    assert process.returncode is not None


def test_close_ends_the_worker(python: Path, folder: Path) -> None:
    backend = VllmBackend(folder, python=python)
    process = backend._open_process._process
    backend.close()
    backend.close()
    assert process.returncode == 0


def test_an_interpreter_without_vllm_is_named(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UnsupportedError, match="pip install vllm"):
        VllmBackend(folder, python=bare)
    with pytest.raises(UnsupportedError, match="cannot run"):
        VllmBackend(folder, python=tmp_path / "missing")


def test_a_build_for_another_device_is_refused(python: Path, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'cpu'.*'cuda'"):
        VllmBackend(folder, python=python, device="cuda")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float33"}, "float32"),
        ({"weights": "randm"}, "Did you mean 'random'"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], reason: str, python: Path, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        VllmBackend(folder, python=python, **options)


def test_a_folder_that_is_no_model_is_named(python: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model folder"):
        VllmBackend(tmp_path, python=python)


def test_the_worker_sees_its_settings_and_not_our_packages(
    python: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/ours")
    seen = tmp_path / "seen.json"
    spy = tmp_path / "python"
    spy.write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import json, os, sys
            with open({str(seen)!r}, "w") as file:
                json.dump(dict(os.environ), file)
            os.execv({str(python)!r}, [{str(python)!r}, *sys.argv[1:]])
            """
        )
    )
    spy.chmod(0o755)
    backend = VllmBackend(folder, python=spy, cpu_kvcache_space_gib=5, cpu_omp_threads_bind="0-1")
    backend.close()
    environment = json.loads(seen.read_text())
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "5"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in environment
    assert os.environ["PYTHONPATH"] == "/somewhere/of/ours"


def test_the_configuration_builds_it(python: Path, folder: Path) -> None:
    node = OmegaConf.load(CONFIG)
    node.python = str(python)
    node.engine_args = {"max_num_seqs": 3}
    built = {"dtype": "bfloat16", "device": "cpu", "weights": "random", "seed": 4}
    backend = instantiate(node, model_path=str(folder), **built)
    try:
        assert backend.name == "vllm"
        arguments = backend.info().details["engine_args"]
        assert arguments["max_num_seqs"] == 3
        assert arguments["load_format"] == "dummy"
        assert (arguments["dtype"], arguments["seed"]) == ("bfloat16", 4)
    finally:
        backend.close()
