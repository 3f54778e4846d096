"""Runs vLLM's engine in its own interpreter; speaks JSON lines on stdin and stdout.

Started by ``workbench.baselines.vllm_backend``. It imports the standard library and vLLM alone,
so that the interpreter that runs it needs nothing of this project.

Commands, one JSON object a line::

    {"op": "build", "engine_args": {...}}
    {"op": "start"}
    {"op": "add", "requests": [{"id", "prompt_token_ids", "max_tokens", "stop_token_ids"}]}
    {"op": "stop"}
    {"op": "close"}

Answers::

    {"op": "ready", "version", "torch", "device_type", "attention", "base_bytes", "model_bytes",
     "max_model_len", "num_blocks", "block_size"}
    {"op": "started"}
    {"op": "step", "time_s": ..., "outputs": [[id, [token ids], finished, error], ...]}
    {"op": "stopped", "steps": ..., "run_peak_bytes": ...}
    {"op": "fatal", "message": ...}

``time_s`` is ``time.perf_counter()`` when the step returned. On Linux that clock is
CLOCK_MONOTONIC, which all processes of the machine share, so the times compare with the parent's.

After a step that finished a request the worker waits for the parent's next ``add`` (which may be
empty) before it steps again: a load that keeps a fixed number of requests in flight would
otherwise always be one step late, which a caller inside vLLM's process is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_ACK_TIMEOUT_S = 1.0

Message = dict[str, Any]


class Worker:
    """One engine and the commands that drive it."""

    def __init__(self, commands: queue.Queue[Message], answer: Callable[[Message], None]) -> None:
        self._commands = commands
        self._answer = answer
        self._engine: Any = None
        self._on_cuda = False
        self._is_closed = False
        self._num_steps = 0
        self._run_start_bytes = 0
        self._awaits_ack = False

    def serve(self) -> None:
        """Serve commands until ``close`` or the end of the input."""
        while not self._is_closed:
            is_busy = self._engine is not None and self._engine.has_unfinished_requests()
            timeout_s = None
            if is_busy:
                timeout_s = _ACK_TIMEOUT_S if self._awaits_ack else 0.0
            self._take_commands(timeout_s)
            if self._engine is not None and self._engine.has_unfinished_requests():
                self._step()

    def _take_commands(self, timeout_s: float | None) -> None:
        """Wait ``timeout_s`` (None: for ever) for one command, then take all that are there."""
        self._awaits_ack = False
        try:
            command = self._commands.get(block=timeout_s != 0.0, timeout=timeout_s)
            while True:
                self._obey(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _obey(self, command: Message) -> None:
        op = command["op"]
        if op == "build":
            self._build(command["engine_args"])
        elif op == "start":
            self._start()
        elif op == "add":
            self._add(command["requests"])
        elif op == "stop":
            self._stop()
        elif op == "close":
            self._is_closed = True

    def _build(self, engine_args: Message) -> None:
        import vllm
        from vllm.platforms import current_platform

        self._on_cuda = current_platform.device_type == "cuda"
        base_bytes = self._held_bytes()
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**engine_args))
        config = self._engine.vllm_config
        self._answer(
            {
                "op": "ready",
                "version": vllm.__version__,
                "torch": getattr(sys.modules.get("torch"), "__version__", "unknown"),
                "device_type": current_platform.device_type,
                "attention": _attention_name(config),
                "base_bytes": base_bytes,
                "model_bytes": max(0, self._held_bytes() - base_bytes),
                "max_model_len": config.model_config.max_model_len,
                "num_blocks": config.cache_config.num_gpu_blocks or 0,
                "block_size": config.cache_config.block_size,
            }
        )

    def _start(self) -> None:
        self._engine.reset_prefix_cache()
        self._num_steps = 0
        self._reset_peak()
        self._run_start_bytes = self._held_bytes()
        self._answer({"op": "started"})

    def _add(self, requests: list[Message]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            stop_ids = request["stop_token_ids"]
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request["max_tokens"],
                ignore_eos=not stop_ids,
                stop_token_ids=stop_ids,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": request["prompt_token_ids"]}
            try:
                self._engine.add_request(request["id"], prompt, params)
            except (ValueError, TypeError) as error:
                outputs = [[request["id"], [], True, str(error)]]
                self._answer({"op": "step", "time_s": time.perf_counter(), "outputs": outputs})

    def _step(self) -> None:
        results = self._engine.step()
        now = time.perf_counter()
        self._num_steps += 1
        outputs = [
            [result.request_id, list(result.outputs[0].token_ids), result.finished, None]
            for result in results
        ]
        if outputs:
            self._awaits_ack = any(finished for _, _, finished, _ in outputs)
            self._answer({"op": "step", "time_s": now, "outputs": outputs})

    def _stop(self) -> None:
        self._answer(
            {
                "op": "stopped",
                "steps": self._num_steps,
                "run_peak_bytes": max(0, self._peak_bytes() - self._run_start_bytes),
            }
        )

    def _held_bytes(self) -> int:
        if self._on_cuda:
            return int(sys.modules["torch"].cuda.memory_allocated())
        return _status_bytes("VmRSS:")

    def _reset_peak(self) -> None:
        if self._on_cuda:
            sys.modules["torch"].cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def _peak_bytes(self) -> int:
        if self._on_cuda:
            return int(sys.modules["torch"].cuda.max_memory_allocated())
        return _status_bytes("VmHWM:")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _attention_name(config: Any) -> str:
    """Name of the attention classes that the engine's layers were built with."""
    layers = getattr(config.compilation_config, "static_forward_context", {}) or {}
    names = set()
    for layer in layers.values():
        backend = getattr(layer, "attn_backend", None)
        if backend is not None:
            names.add(backend.get_name())
    return ", ".join(sorted(names)) or "unknown"


def _read_commands(stream: TextIO, commands: queue.Queue[Message]) -> None:
    for line in stream:
        commands.put(json.loads(line))
    commands.put({"op": "close"})


def main() -> None:
    """Serve one parent."""
    # Libraries print to stdout: keep it for the answers, and send theirs to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # This file's folder must not shadow installed packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    commands: queue.Queue[Message] = queue.Queue()
    reader = threading.Thread(target=_read_commands, args=(sys.stdin, commands), daemon=True)
    reader.start()

    def answer(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        Worker(commands, answer).serve()
    except Exception as error:
        # Before the answer: the parent quotes what stderr holds when the answer comes.
        traceback.print_exc()
        answer({"op": "fatal", "message": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
