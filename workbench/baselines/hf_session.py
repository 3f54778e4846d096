"""One manager of the library's continuous batching, and the requests inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from workbench.baselines.intake import Intake
from workbench.core.workload import WorkloadRequest

_STOP_TIMEOUT_S = 60.0


class ManagerSession:
    """Submits requests to a running manager and tells its stream of tokens.

    Parameters
    ----------
    manager
        A started ``ContinuousBatchingManager``; the session owns it from here on.
    num_blocks
        Blocks of its cache.
    eos_token_ids
        Ids that end a request which does not ignore them.
    on_kv_tokens
        Called with the number of tokens that the cache holds, whenever that grows.
    """

    def __init__(
        self,
        manager: Any,
        *,
        num_blocks: int,
        eos_token_ids: Sequence[int],
        on_kv_tokens: Callable[[int], None],
    ) -> None:
        self.num_blocks = num_blocks
        self._manager = manager
        self._eos_token_ids = list(eos_token_ids)
        self._on_kv_tokens = on_kv_tokens
        self._running: dict[str, WorkloadRequest] = {}
        self._num_told: dict[str, int] = {}
        self._num_kv_tokens = 0

    @property
    def num_running(self) -> int:
        """Requests submitted and not ended."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        """Whether the manager's generation thread runs."""
        return bool(self._manager.is_running())

    def submit(self, request: WorkloadRequest, intake: Intake) -> None:
        """Hand over ``request``, which must fit the cache."""
        accepted = self._manager.add_request(
            input_ids=list(request.prompt_token_ids),
            request_id=request.request_id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            record_timestamps=True,
            eos_token_id=-1 if request.ignore_eos else self._eos_token_ids,
        )
        if accepted is None:
            intake.fail(request.request_id, f"transformers refused it: {self._fatal_error()}.")
            return
        self._running[request.request_id] = request
        self._num_told[request.request_id] = 0

    def collect(self, intake: Intake, timeout_s: float) -> None:
        """Tell what the manager has produced, waiting ``timeout_s`` for the first of it."""
        was_alive = self.is_alive
        output = self._manager.get_result(timeout=timeout_s)
        if output is None and not was_alive:
            reason = f"the generation thread of transformers ended: {self._fatal_error()}."
            for request_id in list(self._running):
                self._forget(request_id)
                intake.fail(request_id, reason)
        while output is not None:
            self._tell(output, intake)
            output = self._manager.get_result(timeout=0)

    def close(self, is_hard: bool = False) -> int:
        """Stop the manager and free its cache.

        Parameters
        ----------
        is_hard
            Do not finish what still runs.

        Returns
        -------
        int
            Steps that the manager ran.
        """
        self._manager.stop(block=True, timeout=_STOP_TIMEOUT_S, hard_stop=is_hard)
        self._manager.destroy()
        return int(getattr(self._manager, "current_batch", 0))

    def _tell(self, output: Any, intake: Intake) -> None:
        request_id = output.request_id
        if request_id not in self._running:
            return
        if output.error is not None:
            self._forget(request_id)
            intake.fail(request_id, f"transformers failed it: {output.error}")
            return
        token_ids = output.generated_tokens[self._num_told[request_id] :]
        is_finished = output.is_finished()
        if not token_ids and not is_finished:
            return
        self._grow(request_id, len(token_ids))
        if is_finished:
            self._forget(request_id)
        # The library stamped the token when it came to the host; waking this thread took longer.
        time_s = output.timestamps[-1] if output.timestamps else time.perf_counter()
        intake.tell(request_id, token_ids, time_s=time_s, finished=is_finished)

    def _grow(self, request_id: str, num_tokens: int) -> None:
        if self._num_told[request_id] == 0:
            # The newest token of a request is not in the cache yet.
            self._num_kv_tokens += len(self._running[request_id].prompt_token_ids) - 1
        self._num_told[request_id] += num_tokens
        self._num_kv_tokens += num_tokens
        self._on_kv_tokens(self._num_kv_tokens)

    def _forget(self, request_id: str) -> None:
        request = self._running.pop(request_id)
        num_told = self._num_told.pop(request_id)
        if num_told:
            self._num_kv_tokens -= len(request.prompt_token_ids) - 1 + num_told

    def _fatal_error(self) -> str:
        status = getattr(self._manager, "background_thread_status", None)
        return str(getattr(status, "fatal_error", None) or "no reason was given")
