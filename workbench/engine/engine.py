"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from workbench.core.errors import RequestError
from workbench.core.outputs import CompletionOutput, RequestOutput
from workbench.core.request import FinishReason, Request
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord
from workbench.engine.ledger import Ledger
from workbench.engine.output import RequestState, StopStringScan, Tokenizer
from workbench.slots.component import Component
from workbench.slots.executor import Executor
from workbench.slots.graph_runner import GraphRunner
from workbench.slots.loop import FinishedStep, Loop
from workbench.slots.scheduler import Scheduler
from workbench.slots.step_plan import RequestUpdate

#: A prompt: text, token ids, or chat messages (``[{"role": ..., "content": ...}]``).
Prompt: TypeAlias = str | Sequence[int] | Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The components that an engine drives, and what it must know of the model."""

    scheduler: Scheduler
    executor: Executor
    loop: Loop
    components: dict[str, Component]
    graph_runner: GraphRunner
    ledger: Ledger
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    seed: int = 0
    info: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Serves requests with whatever components it was assembled from.

    Built by :func:`workbench.build_engine`. Not safe for use from several threads.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.tokenizer = parts.tokenizer
        # Bounded, so that a server may run for days; a bench run stays far under it.
        self.steps: deque[StepRecord] = deque(maxlen=1 << 17)
        self._device_until_s = 0.0  # when the tokens of the last step were there
        self._ahead_s = 0.0  # of the last call, for the step that comes now
        self._draft_failures = 0
        self._states: dict[str, RequestState] = {}
        self._child_of: dict[str, tuple[RequestState, int]] = {}
        self._ids = itertools.count()
        self._seeds = itertools.count(parts.seed)

    # -- in -----------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> str:
        """Queue a prompt; its tokens come out of :meth:`step`.

        Parameters
        ----------
        priority
            The higher, the sooner, where the ``policy`` or ``eviction`` slot orders by it.
        cache_salt
            Requests share cached prefixes only with those of the same salt: one a tenant keeps
            tenants from learning each other's prompts by how fast an answer comes.

        Raises
        ------
        RequestError
            The prompt or a parameter is not valid, or the request could never be held.
        """
        sampling = sampling or SamplingParams()
        sampling.validate()
        self._check_priority(priority)
        extra_keys = _extra_keys(cache_salt)
        token_ids = self._tokenize(prompt)
        request_id = request_id if request_id is not None else self._new_id()
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine has none.")
        children = [
            request_id if sampling.n == 1 else f"{request_id}#{k}" for k in range(sampling.n)
        ]
        for name in (request_id, *children):
            if name in self._states or name in self._child_of:
                raise RequestError(f"request id {name!r} is in use already.")
        state = RequestState(
            request_id=request_id,
            prompt_token_ids=token_ids,
            child_ids=children,
            completions=[],
            scan=StopStringScan(sampling.stop, self.tokenizer)
            if sampling.stop and self.tokenizer
            else None,
        )
        self._states[request_id] = state
        try:
            self._queue_completions(state, sampling, priority, extra_keys)
        except BaseException:
            self.abort(request_id)
            raise
        return request_id

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise RequestError(f"priority={priority!r} is not valid: it must be an integer.")
        if priority and not any(c.uses_priority for c in self.parts.components.values()):
            raise RequestError(
                f"priority={priority} would change nothing: no component of this engine orders by "
                "it. Choose engine/policy=priority, or leave priority at 0."
            )

    def _queue_completions(
        self,
        state: RequestState,
        sampling: SamplingParams,
        priority: int,
        extra_keys: tuple[str, ...],
    ) -> None:
        base = sampling.seed if sampling.seed is not None else next(self._seeds)
        for k, child in enumerate(state.child_ids):
            self._child_of[child] = (state, k)
            request = Request(
                request_id=child,
                prompt_token_ids=state.prompt_token_ids,
                sampling=dataclasses.replace(sampling, seed=_child_seed(base, k)),
                eos_token_ids=self.parts.eos_token_ids,
                arrival_s=time.perf_counter(),
                priority=priority,
                extra_keys=extra_keys,
            )
            # The user's view and the scheduler's book of a completion are one list.
            state.completions.append(CompletionOutput(k, request.output_token_ids))
            self.parts.scheduler.add(request)

    def _new_id(self) -> str:
        """An id that no request has, not even one that the caller named."""
        names = (f"request-{number}" for number in self._ids)
        return next(name for name in names if name not in self._states)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        prompt = _plain(prompt)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("text prompts need a tokenizer; give token ids instead.")
            token_ids = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], dict):
            template = getattr(self.tokenizer, "apply_chat_template", None)
            if template is None:
                raise RequestError("chat messages need a tokenizer with a chat template.")
            text = template(prompt, tokenize=False, add_generation_prompt=True)
            assert self.tokenizer is not None
            # The template has written its own special tokens.
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        elif set(map(type, prompt)) == {int}:  # the common case, without a call a token
            token_ids = cast("list[int]", prompt)
        else:
            token_ids = [_as_id(token) for token in prompt]
        if not token_ids:
            raise RequestError("the prompt is empty: it must hold at least one token.")
        vocab = self.parts.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            bad = next(t for t in token_ids if not 0 <= t < vocab)
            raise RequestError(
                f"token id {bad} is outside the vocabulary: ids must be 0 to {vocab - 1}."
            )
        return list(token_ids)

    def abort(self, request_id: str) -> None:
        """End a request wherever it stands; what it held is freed. Unknown ids are ignored."""
        state = self._states.pop(request_id, None)
        if state is None:
            return
        for child in state.child_ids:
            self.parts.scheduler.finish(child, FinishReason.ABORT)
            self._child_of.pop(child, None)

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._states)

    def unfinished_ids(self) -> list[str]:
        """Ids of requests that wait or run."""
        return list(self._states)

    # -- steps --------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; what it added to which request. Empty where nothing could run.

        A request's output is one object, brought up to date at every step: read what you need of
        it before the next one.
        """
        began = time.perf_counter()
        parts = self.parts
        done = parts.loop.step(parts.scheduler, parts.executor)
        if done is None:
            return []
        returned = time.perf_counter()
        updates = done.updates
        if updates is None:
            updates = parts.scheduler.update_from_output(done.plan, done.result)
        parts.ledger.observe(parts.scheduler.kv_usage())
        updated = time.perf_counter()
        outputs = [out for update in updates if (out := self._book(update)) is not None]
        self._record(done, updates, began, returned, updated)
        return outputs

    def _book(self, update: RequestUpdate) -> RequestOutput | None:
        request = update.request
        entry = self._child_of.get(request.request_id)
        if entry is None:
            return None
        state, index = entry
        new_token_ids = update.new_token_ids
        stopped = None
        if state.scan is not None or update.logprobs:
            stopped = state.look(index, new_token_ids, update.logprobs)
        if stopped is not None:
            num_before = len(state.completions[index].token_ids) - len(new_token_ids)
            new_token_ids = new_token_ids[: stopped[0] - num_before]
            self.parts.scheduler.finish(request.request_id, FinishReason.STOP, stopped[0])
        if stopped is not None or request.is_finished:
            state.end(index, request, self.tokenizer, stopped)
            del self._child_of[request.request_id]
            if state.finished:
                del self._states[state.request_id]
        return state.output(new_token_ids)

    def _record(
        self,
        done: FinishedStep,
        updates: list[RequestUpdate],
        began: float,
        returned: float,
        updated: float,
    ) -> None:
        plan, result = done.plan, done.result
        parts_us, starts_s = result.timings_us, result.starts_s
        for part, start, end in done.spans:
            starts_s[part], parts_us[part] = start, (end - start) * 1e6
        # What nobody stamped. The call may have begun the next step, and this one in the last call.
        spent_us = (returned - began - done.ahead_s + self._ahead_s) * 1e6
        self._ahead_s = done.ahead_s
        stamped_us = sum(parts_us.values())
        parts_us["other"] = max(0.0, spent_us - stamped_us)
        total_us = max(spent_us, stamped_us)
        if done.updates is None:
            starts_s["update"], parts_us["update"] = returned, (updated - returned) * 1e6
            total_us += parts_us["update"]
            returned = updated
        starts_s["output"] = returned
        parts_us["output"] = output_us = (time.perf_counter() - returned) * 1e6
        host_us = total_us + output_us
        until_s = device_start_s = self._device_until_s
        if "wait" in starts_s:  # else the executor stamps nothing
            wait_us = parts_us["wait"]
            host_us -= parts_us["model"] + parts_us["sample"] + wait_us
            until_s = self._device_until_s = starts_s["wait"] + wait_us * 1e-6
            if starts_s["model"] > device_start_s:
                device_start_s = starts_s["model"]
        num_output = sum([len(u.new_token_ids) for u in updates])
        num_tokens = plan.total_num_scheduled_tokens
        num_drafts = sum(plan.num_draft_tokens)
        num_requests = len(plan.request_ids)
        num_single = num_requests
        if num_tokens != num_requests:
            num_single = plan.num_scheduled_tokens.count(1)
        sampled = sum(map(len, result.token_ids))
        num_sampling = sum(plan.samples)
        self._draft_failures += result.num_draft_failures
        self.steps.append(
            StepRecord(
                step=plan.step,
                num_requests=num_requests,
                num_scheduled_tokens=num_tokens,
                num_prompt_tokens=num_tokens - num_drafts - num_sampling,
                num_cached_tokens=plan.num_cached_tokens,
                num_padded_tokens=result.num_padded_tokens,
                num_draft_tokens=num_drafts,
                num_accepted_tokens=sampled - num_sampling,
                num_output_tokens=num_output,
                num_idle_rows=plan.num_idle_rows,
                num_single_tokens=num_single,
                num_context_tokens=result.num_context_tokens,
                graph_mode=result.graph_mode,
                host_us=host_us,
                device_us=(until_s - device_start_s) * 1e6,
                num_draft_failures=result.num_draft_failures,
                parts_us=parts_us,
                starts_s=starts_s,
                device_start_s=device_start_s,
            )
        )

    # -- out ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Serve prompts to the end; outputs in the order of the prompts.

        A prompt that cannot be served comes back with ``error`` set, and the others finish.

        Parameters
        ----------
        prompts
            One prompt or several: text, token ids or chat messages.
        sampling
            For all prompts, or one each.
        priority, cache_salt
            For all prompts, as in :meth:`add_request`.
        """
        listed = _as_list(prompts)
        if sampling is None or isinstance(sampling, SamplingParams):
            each: Iterable[SamplingParams | None] = [sampling] * len(listed)
        else:
            each = list(sampling)
            if len(sampling) != len(listed):
                raise RequestError(
                    f"{len(listed)} prompts but {len(sampling)} sampling parameters: give one "
                    "for all, or one each."
                )
        results: dict[str, RequestOutput] = {}
        order = []
        try:
            for prompt, params in zip(listed, each, strict=True):
                request_id = self._new_id()
                order.append(request_id)
                try:
                    self.add_request(
                        prompt, params, request_id, priority=priority, cache_salt=cache_salt
                    )
                except RequestError as error:
                    results[request_id] = RequestOutput(
                        request_id, [], [], finished=True, error=str(error)
                    )
            while any(i not in results for i in order):
                for output in self.step():
                    if output.finished:
                        results[output.request_id] = output
        except BaseException:
            for request_id in order:
                self.abort(request_id)
            raise
        return [results[i] for i in order]

    # -- what happened --------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Counters of all components since :meth:`reset_counters`, as ``slot.counter``."""
        merged: dict[str, float] = {}
        for slot, component in self.parts.components.items():
            for name, value in component.counters().items():
                merged[f"{slot}.{name}"] = value
        # A drafter that fails cannot be trusted to count it.
        merged["drafter.failures"] = self._draft_failures
        for name, value in self.parts.graph_runner.replayed_counters().items():
            merged[name] = merged.get(name, 0) + value
        return merged

    def reset_counters(self) -> None:
        """Set all counters to zero and forget past steps."""
        for component in self.parts.components.values():
            component.reset_counters()
        self._draft_failures = 0
        self.steps.clear()
        self.parts.ledger.reset()

    def clear_cached(self) -> None:
        """Forget cached prefixes and all else of past requests, so that what comes next starts
        cold."""
        for component in self.parts.components.values():
            component.clear_cached()
        self.parts.scheduler.space.clear_cached()

    def check_integrity(self) -> None:
        """Raise AssertionError where the engine's books contradict each other."""
        self.parts.scheduler.check_integrity()


def _extra_keys(cache_salt: str | None) -> tuple[str, ...]:
    """What beside its tokens the KV of a request may be shared by."""
    if cache_salt is None:
        return ()
    if not isinstance(cache_salt, str) or not cache_salt:
        raise RequestError(
            f"cache_salt={cache_salt!r} is not valid: it must be a non-empty string, or None."
        )
    return (f"salt:{cache_salt}",)


def _child_seed(base: int, index: int) -> int:
    """Seeds of a request's completions, within int64; the first is the request's own.

    The others are hashed: a draw comes from seed and position by addition, so seeds at a fixed
    distance would give one completion the numbers of another, some positions later.
    """
    if index == 0:
        return base % 2**63
    digest = hashlib.blake2b(f"{base}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _plain(prompt: Any) -> Prompt:
    """Arrays and tensors as lists; refuses what is no prompt at all."""
    tolist = getattr(prompt, "tolist", None)
    if tolist is not None:
        prompt = tolist()
    if not isinstance(prompt, Sequence):
        raise RequestError(
            f"{prompt!r} is no prompt: give text, a list of token ids, or chat messages."
        )
    return prompt


def _as_id(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise RequestError(f"token id {token!r} is not an integer.") from None


def _as_list(prompts: Any) -> list[Prompt]:
    """Tell one prompt from several."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int | dict):
        return [prompts]
    return list(prompts)
