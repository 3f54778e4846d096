"""Which steps are prepared for an engine."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.engine.decode_step import DecodeStep
from workbench.engine.mixed_step import MixedStep
from workbench.engine.prepared_step import StepParts
from workbench.engine.verify_step import VerifyStep
from workbench.slots.drafter import Drafter
from workbench.slots.graph_runner import GraphRunner
from workbench.slots.verifier import Verifier


@dataclass(frozen=True, slots=True)
class PreparedSteps:
    """One of each kind that a graph runner prepares; None of the others."""

    decode: DecodeStep | None = None
    verify: VerifyStep | None = None
    mixed: MixedStep | None = None


def make_steps(
    parts: StepParts,
    graph_runner: GraphRunner,
    drafter: Drafter,
    verifier: Verifier,
    max_model_len: int,
    step_tokens: int,
) -> PreparedSteps:
    """Steps with their buffers, not run yet, for plans of at most ``step_tokens`` tokens."""
    if not graph_runner.prepares:
        return PreparedSteps()
    max_num_seqs, attention = parts.table.padding_row, parts.attention
    verify = mixed = None
    tokens_each = drafter.num_lookahead_tokens + 1
    if 1 < tokens_each < max_model_len and not drafter.proposes_trees:
        size = min(graph_runner.largest_verify(attention, tokens_each), max_num_seqs)
        if size:
            verify = VerifyStep(parts, verifier, size, tokens_each)
    max_tokens = graph_runner.largest_mixed(attention, step_tokens)
    if max_tokens:
        mixed = MixedStep(parts, max_tokens)
    return PreparedSteps(DecodeStep(parts), verify, mixed)
