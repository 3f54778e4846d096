"""Gates: wrong tokens and idle techniques are caught, near-ties are told apart from bugs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from workbench.bench.gates import (
    MarginFn,
    check_errors,
    check_evidence,
    check_exact,
    check_quality,
    must_be_equal,
)

REFERENCE = {"a": (1, 2, 3, 4), "b": (5, 6)}


def margins(**values: Sequence[float]) -> MarginFn:
    return lambda request_id, output: values[request_id]


def test_equal_outputs_are_exact() -> None:
    result = check_exact({"a": [1, 2, 3, 4], "b": (5, 6)}, REFERENCE, dtype="float32")
    assert result.verdict == "exact" and result.is_passed
    assert (result.num_requests, result.num_tokens, result.ties) == (2, 6, ())


@pytest.mark.parametrize(
    ("outputs", "position", "expected", "got"),
    [
        ({"a": (1, 2, 9, 4), "b": (5, 6)}, 2, 3, 9),
        ({"a": (1, 2, 3), "b": (5, 6)}, 3, 4, None),
        ({"a": (1, 2, 3, 4, 7), "b": (5, 6)}, 4, None, 7),
        ({"a": (), "b": (5, 6)}, 0, 1, None),
        ({"b": (5, 6)}, 0, 1, None),
    ],
)
def test_wrong_short_long_and_missing_outputs_fail(
    outputs: dict[str, tuple[int, ...]], position: int, expected: int | None, got: int | None
) -> None:
    result = check_exact(outputs, REFERENCE, dtype="float32")
    assert result.verdict == "FAILED"
    (mismatch,) = result.mismatches
    assert (mismatch.request_id, mismatch.position) == ("a", position)
    assert (mismatch.expected, mismatch.got) == (expected, got)
    assert f"'a' position {position}" in result.message


def test_lossy_outputs_are_held_to_their_bound() -> None:
    """Of six tokens two lie 0.9 and 0.3 nats behind: 0.2 a token."""
    other = {"a": (1, 2, 9, 7), "b": (5, 6)}
    scored = margins(a=[0, 0, 0.9, 0.3])
    result = check_quality(other, REFERENCE, bound=0.21, margin_fn=scored)
    assert result.verdict == "lossy" and result.is_passed and not result.message
    assert result.details == {
        "excess_nats_per_token": pytest.approx(0.2),
        "bound": 0.21,
        "share_of_reference_choices": pytest.approx(4 / 6),
        "num_differing": 1,
    }
    result = check_quality(other, REFERENCE, bound=0.19, margin_fn=scored)
    assert result.verdict == "FAILED" and "0.2 nats a token" in result.message
    assert "'a' position 2" in result.message and "bound of 0.19" in result.message
    broken = margins(a=[0, 0, float("nan"), 0])
    assert check_quality(other, REFERENCE, bound=9, margin_fn=broken).verdict == "FAILED"
    equal = check_quality(REFERENCE, REFERENCE, bound=0.1, margin_fn=None)
    assert equal.verdict == "lossy" and equal.details["excess_nats_per_token"] == 0


def test_lossy_outputs_that_cannot_be_judged_pass_nothing() -> None:
    other = {"a": (1, 2, 9, 4), "b": (5, 6)}
    scored = margins(a=[0, 0, 0.1, 0])
    for outputs, reference, bound, margin_fn, verdict, words in (
        (other, REFERENCE, None, scored, "INVALID", "no bound is promised"),
        (other, REFERENCE, 1.0, None, "INVALID", "bench.reference=hf"),
        ({**other, "c": (1,)}, REFERENCE, 1.0, scored, "INVALID", "no output for request 'c'"),
        ({}, {}, 1.0, scored, "INVALID", "no outputs at all"),
        ({"b": (5, 6)}, REFERENCE, 1.0, scored, "FAILED", "brought 0 output tokens"),
    ):
        result = check_quality(outputs, reference, bound=bound, margin_fn=margin_fn)
        assert result.verdict == verdict and words in result.message
    short = {"a": (1, 2, 9), "b": (5, 6)}
    kept = check_quality(short, REFERENCE, bound=1.0, margin_fn=margins(a=[0, 0, 0.1]))
    assert kept.verdict == "lossy"  # it ended earlier, by its own choice
    cut = check_quality(short, REFERENCE, bound=1.0, margin_fn=scored, fixed_length={"a"})
    assert cut.verdict == "FAILED" and "brought 3 output tokens in place of 4" in cut.message


def test_fp32_on_the_cpu_knows_no_ties() -> None:
    wrong = {"a": (1, 2, 9, 4), "b": (5, 6)}
    tiny = margins(a=[0, 0, 1e-9, 0])
    for dtype in ("float32", "torch.float32"):
        result = check_exact(wrong, REFERENCE, dtype=dtype, margin_fn=tiny, epsilon=1.0)
        assert result.verdict == "FAILED" and result.epsilon is None
    assert must_be_equal("float32", "cpu") and not must_be_equal("float32", "cuda:0")
    assert not must_be_equal("bfloat16", "cpu")


def test_a_near_tie_is_counted_not_failed() -> None:
    wrong = {"a": (1, 2, 9, 8), "b": (5, 6)}
    tie = margins(a=[0, 0, 0.05, 0.0])
    for place in ({"dtype": "bfloat16"}, {"dtype": "float32", "device": "cuda"}):
        result = check_exact(wrong, REFERENCE, margin_fn=tie, epsilon=0.1, **place)
        assert result.verdict == "exact" and result.to_dict()["num_ties"] == 1
        assert result.ties[0].position == 2 and result.ties[0].margin == 0.05


@pytest.mark.parametrize(
    ("found", "position"),
    [
        ([0, 0, 0.1, 0], 2),
        ([0, 0, 3.0, 0], 2),
        ([0, 0, 0.05, 2.0], 3),
        ([0, 0, float("nan"), 0], 2),
    ],
)
def test_a_divergence_beyond_epsilon_fails_also_after_a_tie(
    found: list[float], position: int
) -> None:
    wrong = {"a": (1, 2, 9, 8), "b": (5, 6)}
    result = check_exact(
        wrong, REFERENCE, dtype="bfloat16", margin_fn=margins(a=found), epsilon=0.1
    )
    assert result.verdict == "FAILED"
    assert result.mismatches[0].position == position
    assert "margin" in result.message


def test_without_margins_bf16_must_be_equal() -> None:
    wrong = {"a": (1, 2, 9, 8), "b": (5, 6)}
    assert check_exact(wrong, REFERENCE, dtype="bfloat16", epsilon=1.0).verdict == "FAILED"


def test_length_after_a_tie() -> None:
    short = {"a": (1, 2, 9), "b": (5, 6)}
    tie = margins(a=[0, 0, 0.01])
    kwargs = {"dtype": "bfloat16", "margin_fn": tie, "epsilon": 0.1}
    assert check_exact(short, REFERENCE, **kwargs).verdict == "exact"
    result = check_exact(short, REFERENCE, fixed_length={"a"}, **kwargs)
    assert result.verdict == "FAILED" and result.mismatches[0].position == 3


def test_margin_fn_must_give_one_a_token() -> None:
    with pytest.raises(ValueError, match="one a token"):
        check_exact(
            {"a": (1, 9, 3, 4), "b": (5, 6)}, REFERENCE, dtype="bfloat16",
            margin_fn=margins(a=[0.0]), epsilon=1,
        )  # fmt: skip


def test_a_reference_that_lacks_a_request_judges_nothing() -> None:
    outputs = {"a": (1, 2, 3, 4), "b": (5, 6), "c": (1,)}
    result = check_exact(outputs, REFERENCE, dtype="float32")
    assert result.verdict == "INVALID" and "'c'" in result.message
    assert check_exact({}, {}, dtype="float32").verdict == "INVALID"


def test_errors() -> None:
    assert check_errors({}) is None
    refused = check_errors({"a": "too long"})
    assert refused is not None and refused.verdict == "FAILED" and "too long" in refused.message
    several = check_errors({"a": "too long", "b": "too long"})
    assert several is not None and "'a'" in several.message and "2 requests" in several.message


def test_evidence() -> None:
    marker = {"spec": {"evidence": ["drafted", "accepted"]}}
    found, missing = check_evidence(marker, {"drafted": 5, "accepted": 2, "other": 1})
    assert found == {"drafted": 5, "accepted": 2} and missing is None
    found, missing = check_evidence(marker, {"drafted": 5, "accepted": 0})
    assert missing is not None and missing.verdict == "INVALID"
    assert "'accepted' is 0" in missing.message and "'spec'" in missing.message
    _, missing = check_evidence(marker, {"drafted": 5})
    assert missing is not None and "'accepted' was not reported" in missing.message
    _, missing = check_evidence({"spec": {}}, {"drafted": 5})
    assert missing is not None and "declares no evidence" in missing.message
    _, missing = check_evidence(marker, {"drafted": 5, "accepted": float("nan")})
    assert missing is not None
    assert check_evidence({}, {}) == ({}, None)
