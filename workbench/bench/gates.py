"""What must hold before a number may be printed: the tokens are right, the technique ran.

A gate returns a :class:`GateResult`; a result that did not pass voids the variant's speed (the
record refuses to carry one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["exact", "distributional", "lossy", "counted", "FAILED", "INVALID"]
PASSED: tuple[Verdict, ...] = ("exact", "distributional", "lossy")
COUNTED: Verdict = "counted"
"""Of a run without a model: its books were checked, and it has no outputs and no speed."""

Outputs = Mapping[str, Sequence[int]]
MarginFn = Callable[[str, Sequence[int]], Sequence[float]]
"""``(request_id, output_token_ids) -> margins``: for every output position, the reference's
highest logit minus its logit of the token given, with the tokens given so far as context (one
forward pass over prompt and output). Zero where the reference would have chosen the same token."""

_MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where one request's output is not the reference's.

    Attributes
    ----------
    position
        Output position, from 0.
    expected, got
        Token ids; None where one side ended.
    margin
        How far the reference preferred its own token, in logits; None where not computed.
    """

    request_id: str
    position: int
    expected: int | None
    got: int | None
    margin: float | None = None

    def __str__(self) -> str:
        margin = "" if self.margin is None else f" (reference margin {self.margin:.4g})"
        return (
            f"request {self.request_id!r} position {self.position}: expected "
            f"{_token(self.expected)}, got {_token(self.got)}{margin}"
        )


def _token(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"


@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate found.

    Attributes
    ----------
    message
        Why it did not pass; empty where it did.
    ties
        Requests whose first divergence is a near-tie of the reference.
    num_tokens
        Output tokens checked.
    epsilon
        Margin under which a divergence counts as a tie; None where every token must be equal.
    details
        What a check of another kind measured (distance, KL, perplexity) and its bound.
    """

    verdict: Verdict
    message: str = ""
    mismatches: tuple[Mismatch, ...] = ()
    ties: tuple[Mismatch, ...] = ()
    num_requests: int = 0
    num_tokens: int = 0
    epsilon: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_passed(self) -> bool:
        """Whether a number may be printed."""
        return self.verdict in PASSED

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; at most five mismatches and ties are listed, all are counted."""
        data = asdict(self)
        for key, found in (("mismatches", self.mismatches), ("ties", self.ties)):
            data[key] = [asdict(item) for item in found[:_MAX_LISTED]]
            data[f"num_{key}"] = len(found)
        return data


def must_be_equal(dtype: str, device: str) -> bool:
    """Whether every token must equal the reference's: fp32 on the CPU."""
    return dtype.removeprefix("torch.") in ("float32", "fp32") and device.startswith("cpu")


def check_exact(
    outputs: Outputs,
    reference: Outputs,
    *,
    dtype: str,
    device: str = "cpu",
    margin_fn: MarginFn | None = None,
    epsilon: float = 0.0,
    fixed_length: AbstractSet[str] = frozenset(),
) -> GateResult:
    """Compare greedy outputs with the reference, token by token.

    In fp32 on the CPU every token must be equal. In lower precision or on a GPU the first
    divergence of a request may be a near-tie: it counts as one only where **every** token given
    lies within ``epsilon`` logits of the reference's choice for the tokens before it. That is
    stricter than the top-2 margin at the divergence alone, since it also holds the tokens that
    follow to the reference.

    Parameters
    ----------
    outputs, reference
        Output token ids by request id.
    dtype, device
        Of the variant under test, such as ``"float32"`` and ``"cuda:0"``.
    margin_fn
        Margins of the reference; without it no divergence can count as a tie.
    epsilon
        In logits.
    fixed_length
        Requests that must bring as many tokens as the reference even after a tie (those that
        ignore the end-of-text token).

    Returns
    -------
    ``exact`` with the ties listed, ``FAILED`` with the mismatches, or ``INVALID`` where the
    reference lacks a request.
    """
    lacking = _lacking(outputs, reference)
    if lacking is not None:
        return lacking
    ties_allowed = margin_fn is not None and not must_be_equal(dtype, device)
    mismatches: list[Mismatch] = []
    ties: list[Mismatch] = []
    for request_id, expected in reference.items():
        got = outputs.get(request_id, ())
        first = _first_difference(request_id, expected, got)
        if first is None:
            continue
        is_tie = False
        if ties_allowed and first.got is not None and first.expected is not None:
            assert margin_fn is not None
            first, is_tie = _judge(first, got, margin_fn(request_id, got), epsilon)
            if is_tie and request_id in fixed_length and len(got) != len(expected):
                end = min(len(got), len(expected))
                first, is_tie = _at(request_id, end, expected, got), False
        (ties if is_tie else mismatches).append(first)
    message = ""
    if mismatches:
        more = f" and {len(mismatches) - 1} more requests" if len(mismatches) > 1 else ""
        message = f"output differs from the reference: {mismatches[0]}{more}."
    return GateResult(
        verdict="FAILED" if mismatches else "exact",
        message=message,
        mismatches=tuple(mismatches),
        ties=tuple(ties),
        num_requests=len(reference),
        num_tokens=sum(len(tokens) for tokens in outputs.values()),
        epsilon=epsilon if ties_allowed else None,
    )


def _lacking(outputs: Outputs, reference: Outputs) -> GateResult | None:
    """``INVALID`` where there is nothing to compare some output with."""
    lacking = sorted(set(outputs) - set(reference))
    if not lacking and reference:
        return None
    what = f"no output for request {lacking[0]!r}" if lacking else "no outputs at all"
    return GateResult("INVALID", f"the reference has {what}, so nothing can be checked.")


def _at(request_id: str, position: int, expected: Sequence[int], got: Sequence[int]) -> Mismatch:
    return Mismatch(
        request_id,
        position,
        expected[position] if position < len(expected) else None,
        got[position] if position < len(got) else None,
    )


def _first_difference(
    request_id: str, expected: Sequence[int], got: Sequence[int]
) -> Mismatch | None:
    """Return the first position where the two differ, or where one of them ends."""
    for position in range(max(len(expected), len(got))):
        found = _at(request_id, position, expected, got)
        if found.expected != found.got:
            return found
    return None


def _judge(
    first: Mismatch, got: Sequence[int], margins: Sequence[float], epsilon: float
) -> tuple[Mismatch, bool]:
    """Decide whether a divergence is a tie; return it, or the first token that is none."""
    if len(margins) != len(got):
        raise ValueError(
            f"margin_fn gave {len(margins)} margins for {len(got)} tokens of request "
            f"{first.request_id!r}; it must give one a token."
        )
    for position in range(first.position, len(got)):
        # Written so that a NaN margin is no tie.
        if not margins[position] < epsilon:
            expected = first.expected if position == first.position else None
            return Mismatch(
                first.request_id, position, expected, got[position], float(margins[position])
            ), False
    margin = float(margins[first.position])
    return Mismatch(first.request_id, first.position, first.expected, first.got, margin), True


def check_quality(
    outputs: Outputs,
    reference: Outputs,
    *,
    bound: float | None,
    margin_fn: MarginFn | None,
    fixed_length: AbstractSet[str] = frozenset(),
) -> GateResult:
    """Hold greedy outputs that may differ from the reference's to a bound on how much.

    Measured is the mean, over all output tokens, of how much less likely the reference finds a
    token than its own choice after the same tokens, ``ln p(best) - ln p(given)``: excess nats a
    token. The reference's own outputs have 0. One forward pass of the reference over prompt and
    output tells (the normaliser cancels, so that it is a difference of logits).

    Parameters
    ----------
    outputs, reference, margin_fn, fixed_length
        As of :func:`check_exact`.
    bound
        In nats a token; None where none was promised, so that nothing can pass.

    Returns
    -------
    ``lossy`` with what was measured among the details, ``FAILED`` over the bound or where an output
    is not as long as it must be, or ``INVALID`` where nothing can be said.
    """
    lacking = _lacking(outputs, reference)
    if lacking is not None:
        return lacking
    if bound is None:
        return GateResult(
            "INVALID",
            "no bound is promised for its outputs (`quality_bound` of a technique with "
            "losslessness 'lossy'), so they cannot be judged: its tokens are counted, not timed.",
        )
    found = {
        request_id: _first_difference(request_id, expected, outputs.get(request_id, ()))
        for request_id, expected in reference.items()
    }
    differing = tuple(mismatch for mismatch in found.values() if mismatch is not None)
    for mismatch in differing:
        name, num = mismatch.request_id, len(outputs.get(mismatch.request_id, ()))
        wanted = len(reference[name])
        if not num or (name in fixed_length and num != wanted):
            message = f"request {name!r} brought {num} output tokens in place of {wanted}."
            return GateResult("FAILED", message, (mismatch,), num_requests=len(reference))
    if differing and margin_fn is None:
        return GateResult(
            "INVALID",
            f"outputs differ from the reference ({differing[0]}), and no model is at hand to say "
            "by how much: ask for bench.reference=hf or hf_scored.",
        )
    total, num_chosen, num_tokens = 0.0, 0, 0
    for request_id, first in found.items():
        given = outputs[request_id]
        num_tokens += len(given)
        if first is None:
            num_chosen += len(given)
            continue
        assert margin_fn is not None
        margins = margin_fn(request_id, given)
        total += sum(margins)
        num_chosen += sum(margin == 0 for margin in margins)
    excess = total / num_tokens
    is_within = excess <= bound  # a NaN is not
    details = {
        "excess_nats_per_token": excess,
        "bound": bound,
        "share_of_reference_choices": num_chosen / num_tokens,
        "num_differing": len(differing),
    }
    message = ""
    if not is_within:
        message = (
            f"outputs are {excess:.3g} nats a token less likely than the reference's choices, over "
            f"the bound of {bound:g}; {differing[0]}."
        )
    return GateResult(
        verdict="lossy" if is_within else "FAILED",
        message=message,
        num_requests=len(reference),
        num_tokens=num_tokens,
        details=details,
    )


def check_errors(errors: Mapping[str, str]) -> GateResult | None:
    """Fail a run in which a request was refused.

    Parameters
    ----------
    errors
        Message by request id.

    Returns
    -------
    None where all were served.
    """
    if not errors:
        return None
    request_id, text = next(iter(errors.items()))
    more = f" ({len(errors)} requests in all)" if len(errors) > 1 else ""
    return GateResult("FAILED", f"request {request_id!r} was not served: {text}{more}")


def check_evidence(
    techniques: Mapping[str, Mapping[str, Any]], counters: Mapping[str, float]
) -> tuple[dict[str, float], GateResult | None]:
    """Demand that every enabled technique moved each of its counters.

    Parameters
    ----------
    techniques
        Marker by technique name; its ``evidence`` lists counters that must be above zero.
    counters
        Of one measured run.

    Returns
    -------
    The evidence found (counter to value), and an ``INVALID`` result naming what is missing, or
    None where all is there.
    """
    evidence: dict[str, float] = {}
    missing: list[str] = []
    for technique, marker in techniques.items():
        wanted = list(marker.get("evidence") or ())
        if not wanted:
            missing.append(f"technique {technique!r} declares no evidence counter")
        for counter in wanted:
            if counter not in counters:
                missing.append(f"technique {technique!r}: counter {counter!r} was not reported")
                continue
            evidence[counter] = counters[counter]
            if not counters[counter] > 0:
                missing.append(
                    f"technique {technique!r} did nothing: counter {counter!r} is "
                    f"{counters[counter]:g}"
                )
    if not missing:
        return evidence, None
    return evidence, GateResult("INVALID", "no evidence: " + "; ".join(missing) + ".")
