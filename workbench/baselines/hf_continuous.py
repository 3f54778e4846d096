"""Hugging Face's own continuous batching: its scheduler and its paged cache."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import GenerationConfig

from workbench.baselines.hf_backend import HfBackend
from workbench.baselines.hf_model import versions
from workbench.baselines.hf_session import ManagerSession
from workbench.baselines.intake import Intake
from workbench.core.errors import ConfigError, UnsupportedError, unknown_name
from workbench.core.workload import WorkloadRequest

# The library holds new requests back once fewer than 15 % of its blocks are free.
_SAFETY_MARGIN = 0.15
# A generation thread that has nothing to say is looked after this often.
_WATCH_S = 0.5


def _library() -> tuple[type[Any], type[Any]]:
    """Return the manager class and the config class.

    Raises
    ------
    UnsupportedError
        This version of transformers has neither.
    """
    try:
        from transformers import ContinuousBatchingConfig, ContinuousBatchingManager
    except ImportError as error:
        raise UnsupportedError(
            f"{versions()} has no continuous batching; install transformers 5.17 or later."
        ) from error
    return ContinuousBatchingManager, ContinuousBatchingConfig


class HfContinuousBatching(HfBackend):
    """Hugging Face Transformers with its own continuous batching.

    Requests go to the library's manager as they arrive, and tokens are taken from its stream with
    the times that it recorded when each was on the host. Every ``run`` has a fresh manager, hence
    an empty prefix cache; it is built before the first request is pulled if :meth:`prepare` told
    the workload, and after the first pull otherwise.

    Parameters
    ----------
    page_size
        Tokens of a page of the cache (``block_size`` in transformers before 5.18).
    num_blocks
        Blocks of the cache; None takes enough for the ``max_requests_per_batch`` longest
        requests of the workload, within ``max_cache_fraction`` of the free memory.
    max_batch_tokens
        Tokens of a step; None takes 512 on the CPU, 2048 on other devices.
    max_requests_per_batch
        Requests of a step; None takes 32 on the CPU, 64 on other devices: with sdpa, attention
        of a step is computed over the caches of all its requests.
    max_cache_fraction
        Bound on a cache sized from the workload, as a part of the free memory.
    auto_switch_to_flash
        Let the library replace ``attn_implementation`` by a flash kernel where it finds one.
    library_options
        Further fields of the library's ``ContinuousBatchingConfig``.

    Raises
    ------
    UnsupportedError
        This version of transformers has no continuous batching.
    ConfigError
        An option is unknown or not valid.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        page_size: int = 256,
        num_blocks: int | None = None,
        max_batch_tokens: int | None = None,
        max_requests_per_batch: int | None = None,
        max_cache_fraction: float = 0.25,
        auto_switch_to_flash: bool = False,
        library_options: Mapping[str, Any] | None = None,
        name: str = "hf_continuous",
        **options: Any,
    ) -> None:
        _, config_class = _library()
        self._fields = {field.name for field in dataclasses.fields(config_class)}
        self._library_options = dict(library_options or {})
        for option in self._library_options:
            if option not in self._fields:
                raise unknown_name("library option", option, self._fields)
        positive = {
            "page_size": page_size,
            "num_blocks": num_blocks,
            "max_batch_tokens": max_batch_tokens,
            "max_requests_per_batch": max_requests_per_batch,
        }
        for option, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"{option}={value} is not valid: it must be at least 1.")
        if not 0 < max_cache_fraction <= 1:
            raise ConfigError(f"max_cache_fraction={max_cache_fraction} must be over 0, at most 1.")
        super().__init__(model_path, name=name, **options)
        is_cpu = self.shared.device.type == "cpu"
        self._page_size = page_size
        self._num_blocks = num_blocks
        self._max_batch_tokens = max_batch_tokens or (512 if is_cpu else 2048)
        self._max_requests = max_requests_per_batch or (32 if is_cpu else 64)
        self._max_cache_fraction = max_cache_fraction
        self._auto_switch_to_flash = auto_switch_to_flash
        self._wanted_blocks = 0
        self._attention_used = self._attn_implementation
        self._num_blocks_used = num_blocks
        self._session: ManagerSession | None = None

    def prepare(
        self, requests: Sequence[WorkloadRequest], max_concurrency: int | None = None
    ) -> None:
        """Size the cache for ``requests``."""
        usable = [request for request in requests if self._limits.problem(request) is None]
        most = min(self._max_requests, max_concurrency or self._max_requests)
        self._wanted_blocks = sum(heapq.nlargest(most, map(self._blocks_of, usable)))

    def _attention_in_use(self) -> str:
        return self._attention_used

    def _details(self) -> dict[str, Any]:
        return {
            "page_size": self._page_size,
            "num_blocks": self._num_blocks_used,
            "max_batch_tokens": self._max_batch_tokens,
            "max_requests_per_batch": self._max_requests,
            "auto_switch_to_flash": self._auto_switch_to_flash,
            "library_options": dict(self._library_options),
        }

    def _serve(self, intake: Intake) -> None:
        try:
            if self._wanted_blocks or self._num_blocks is not None:
                self._open()
            self._pump(intake)
        except BaseException:
            self._close_session(is_hard=True)
            raise
        self._close_session()

    def _pump(self, intake: Intake) -> None:
        waiting: deque[WorkloadRequest] = deque()
        while True:
            waiting.extend(intake.pull() if intake.num_in_flight else intake.wait())
            while waiting and self._can_take(waiting[0]):
                self._submit(waiting.popleft(), intake)
            if intake.is_done:
                return
            if self._session is not None and self._session.num_running:
                self._session.collect(intake, self._patience(intake))

    def _patience(self, intake: Intake) -> float:
        """Seconds to wait for a token before looking for arrivals again."""
        due = intake.seconds_until_due()
        return _WATCH_S if due is None else min(max(due, 0.001), _WATCH_S)

    def _submit(self, request: WorkloadRequest, intake: Intake) -> None:
        assert self._session is not None
        blocks = self._blocks_of(request)
        if blocks > self._session.num_blocks:
            intake.fail(
                request.request_id,
                f"the request needs {blocks} blocks of KV cache and the cache has "
                f"{self._session.num_blocks}. Raise num_blocks or max_cache_fraction.",
            )
            return
        self._session.submit(request, intake)

    def _can_take(self, request: WorkloadRequest) -> bool:
        """Whether ``request`` may be submitted now; opens a manager that it fits, if need be."""
        session, blocks = self._session, self._blocks_of(request)
        if session is not None and session.is_alive:
            if blocks <= session.num_blocks:
                return True
            if session.num_running:
                # A larger cache needs a new manager, which has to wait for what runs in this one.
                return False
        if blocks > self._wanted_blocks:
            # Nobody told the workload: expect as many requests as a step takes, all this long.
            self._wanted_blocks = blocks * self._max_requests
        if (
            session is None
            or not session.is_alive
            or self._choose_num_blocks() > session.num_blocks
        ):
            self._close_session()
            self._open()
        return True

    def _blocks_of(self, request: WorkloadRequest) -> int:
        total = len(request.prompt_token_ids) + request.max_tokens
        return math.ceil(total / self._page_size)

    def _choose_num_blocks(self) -> int:
        if self._num_blocks is not None:
            return self._num_blocks
        wanted = math.ceil(self._wanted_blocks / (1 - _SAFETY_MARGIN)) + 1
        shared = self.shared
        free = (
            torch.cuda.mem_get_info(shared.device)[0]
            if shared.device.type == "cuda"
            else psutil.virtual_memory().available
        )
        bytes_per_block = kv_bytes_per_token(shared.model) * self._page_size
        return max(1, min(wanted, int(free * self._max_cache_fraction) // bytes_per_block))

    def _open(self) -> None:
        """Build and start a manager with a cache for what is known of the workload."""
        manager_class, config_class = _library()
        num_blocks = self._choose_num_blocks()
        settings: dict[str, Any] = {
            "page_size" if "page_size" in self._fields else "block_size": self._page_size,
            "num_blocks": num_blocks,
            "max_batch_tokens": self._max_batch_tokens,
            "max_requests_per_batch": self._max_requests,
        }
        if "auto_switch_to_flash" in self._fields:
            settings["auto_switch_to_flash"] = self._auto_switch_to_flash
        elif not self._auto_switch_to_flash and "|" not in self._attn_implementation:
            # Before that field existed, only a paged name kept the library from switching.
            self.shared.use_attention(f"paged|{self._attn_implementation}")
        settings.update(self._library_options)
        # A negative id is the library's way to say that no id ends a request.
        greedy = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=-1, pad_token_id=self.shared.pad_token_id
        )
        try:
            manager = manager_class(self.shared.model, greedy, config_class(**settings))
            self._attention_used = self.shared.attention
            manager.warmup()
        except (MemoryError, ValueError) as error:
            raise ConfigError(
                f"transformers cannot build its cache with {settings}: {error}. Lower "
                "num_blocks, max_batch_tokens or max_requests_per_batch."
            ) from error
        manager.start()
        self._num_blocks_used = num_blocks
        self._session = ManagerSession(
            manager,
            num_blocks=num_blocks,
            eos_token_ids=sorted(self.shared.eos_token_ids) or [-1],
            on_kv_tokens=lambda used: self._count_kv(num_blocks * self._page_size, used),
        )

    def _close_session(self, is_hard: bool = False) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._num_steps += session.close(is_hard)


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token takes in all layers of ``model``."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)
