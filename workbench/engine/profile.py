"""What steps take of a device's memory, measured before its KV pool is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.triton import compiled_together
from workbench.core.memory import DeviceMemory
from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest, SchedulerOutput
from workbench.engine.model_runner import ModelRunner

#: The costliest way to draw that a request may ask for without a penalty: sorted logits, and their
#: log-probabilities.
_SAMPLING = SamplingParams(max_tokens=1, ignore_eos=True, temperature=1.0, top_p=0.9, logprobs=1)
#: For steps whose tokens are whatever was in memory: log-probabilities would be looked up by them.
_COMPILED = dataclasses.replace(_SAMPLING, logprobs=None)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step that a scheduler may plan.

    Attributes
    ----------
    num_tokens
        Tokens of one step.
    num_requests
        Requests of one step, all of which may yield tokens.
    max_model_len
        Tokens of a request.
    num_context_tokens
        Tokens of KV that all requests may have together.
    """

    num_tokens: int
    num_requests: int
    max_model_len: int
    num_context_tokens: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a device before its KV pool was there.

    Attributes
    ----------
    sizes
        Of the steps that were run.
    activation_bytes
        Most that the allocator took for a step, given back after it.
    scratch_bytes
        What libraries and kernels allocated in the first steps and kept.
    graph_bytes
        What prepared steps will hold, by a few of them (``GraphRunner.trial_bytes``).
    used_bytes
        In use on the whole device, by others too, with weights, tables and scratch, and without a
        pool and activations.
    outside_bytes
        The part of it that torch does not know: the CUDA context, code, other processes.
    total_bytes
        Of the device.
    """

    sizes: StepSizes
    activation_bytes: int
    scratch_bytes: int
    graph_bytes: int
    used_bytes: int
    outside_bytes: int
    total_bytes: int

    def kv_bytes(self, memory_fraction: float) -> int:
        """Bytes left for KV where this share of the device may be used; may be negative."""
        return (
            int(memory_fraction * self.total_bytes)
            - self.used_bytes
            - self.activation_bytes
            - self.graph_bytes
        )


def profile_steps(runner: ModelRunner, sizes: StepSizes, memory: DeviceMemory) -> Profile:
    """Run the largest steps through the runner's own path, and measure.

    Parameters
    ----------
    runner
        With a table of its own, which is to be dropped, and a pool of no block but the trash block,
        which takes all that the steps write.
    """
    parts = runner.parts
    memory.trim()
    allocated = memory.allocated_bytes()
    # Kernels of ours only compile here, but those of libraries run, and take what they keep: a
    # workspace of each stream.
    with compiled_together(), torch.inference_mode():
        run_largest_steps(runner, sizes, "compiled", reads=False)
        if parts.prepared_steps:
            parts.graph_runner.compile(parts.prepared_steps)
    # Twice: the first time, libraries take the rest of it.
    run_largest_steps(runner, sizes, "first")
    memory.trim()
    scratch = memory.allocated_bytes() - allocated
    held = memory.reserved_bytes()
    memory.reset_peak()
    run_largest_steps(runner, sizes, "again")
    activations = memory.peak_reserved_bytes() - held
    memory.trim()
    graph_bytes = 0
    if parts.prepared_steps:
        allocated = memory.allocated_bytes()
        with torch.inference_mode():
            graph_bytes = parts.graph_runner.trial_bytes(parts.prepared_steps)
        memory.trim()
        scratch += memory.allocated_bytes() - allocated
    used, reserved = memory.used_bytes(), memory.reserved_bytes()
    return Profile(
        sizes=sizes,
        activation_bytes=max(0, activations),
        scratch_bytes=max(0, scratch),
        graph_bytes=graph_bytes,
        used_bytes=used - parts.pool.num_bytes,
        outside_bytes=used - reserved,
        total_bytes=memory.total_bytes,
    )


def run_largest_steps(
    runner: ModelRunner, sizes: StepSizes, name: str, *, reads: bool = True
) -> list[SchedulerOutput]:
    """Run the step of most tokens, and a step of single tokens with the longest contexts.

    Parameters
    ----------
    reads
        Whether to look at their tokens, which are none where kernels are only compiled.

    Returns
    -------
    Their plans.
    """
    plans: list[SchedulerOutput] = []
    known: list[str] = []
    for kind, lengths in (
        ("tokens", largest_lengths(runner, sizes)),
        ("contexts", longest_contexts(runner, sizes)),
    ):
        sampling = _SAMPLING if reads else _COMPILED
        plan = _plan(runner, f"profile-{name}-{kind}", lengths, known, sampling)
        step = runner.submit(plan)
        if reads:
            step.result()
        else:  # what was in memory would be the drafts of the next request in a row
            runner.table.token_ids.zero_()
        plans.append(plan)
        known = plan.request_ids
    for request_id in known:
        runner.table.remove(request_id)
        runner.drafting.finish(request_id)
    return plans


def largest_lengths(runner: ModelRunner, sizes: StepSizes) -> list[tuple[int, int]]:
    """Tokens by request, computed before and run now, drafts included: as many requests as fit
    with all their drafts, the first ones filled up with prompt."""
    longest = max(1, sizes.max_model_len - 1)  # a prompt leaves room for one token
    least = min(1 + runner.parts.drafter.num_lookahead_tokens, longest)
    count = max(1, min(sizes.num_requests, sizes.num_tokens // least))
    rest = min(sizes.num_tokens, count * longest) - count * least
    lengths = []
    for _ in range(count):
        more = max(0, min(rest, longest - least))
        lengths.append((0, least + more))
        rest -= more
    return lengths


def longest_contexts(runner: ModelRunner, sizes: StepSizes) -> list[tuple[int, int]]:
    """Tokens by request, computed before and run now: every request runs its last token and its
    drafts, over contexts as long as may be held together."""
    longest = max(1, sizes.max_model_len - 1)
    now = min(1 + runner.parts.drafter.num_lookahead_tokens, longest)
    count = max(1, min(sizes.num_requests, sizes.num_tokens // now))
    context = min(longest, sizes.num_context_tokens // count)
    return [(max(0, context - now), now)] * count


def _plan(
    runner: ModelRunner,
    name: str,
    lengths: Sequence[tuple[int, int]],
    finished: list[str],
    sampling: SamplingParams,
) -> SchedulerOutput:
    pool = runner.parts.pool
    ids = [f"{name}-{index}" for index in range(len(lengths))]
    drafts = [min(runner.parts.drafter.num_lookahead_tokens, now - 1) for _, now in lengths]
    new = []
    for request_id, (computed, now), num_drafts in zip(ids, lengths, drafts, strict=True):
        known = computed + now - num_drafts
        num_blocks = -(-(computed + now) // pool.block_size)
        new.append(
            NewRequest(
                request_id=request_id,
                token_ids=[0] * known,
                num_prompt_tokens=known,
                num_computed_tokens=computed,
                block_ids=[pool.num_blocks] * num_blocks,  # the trash block takes it all
                sampling=sampling,
                seed=0,
            )
        )
    return SchedulerOutput(
        step=0,
        request_ids=ids,
        num_scheduled_tokens=[now for _, now in lengths],
        num_draft_tokens=drafts,
        samples=[True] * len(ids),
        new_requests=new,
        new_block_ids={},
        finished_request_ids=finished,
    )
