"""Stop strings: the same cut however many tokens a step brings, at split characters too."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.engines import mixed_prompts, shared_engine, together
from tests.helpers.scripted import run_script
from tests.helpers.tiny_models import hf_greedy, tiny_model, tiny_tokenizer
from workbench.core.errors import RequestError
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams

NUM_DRAFTS = [0, 1, 3, 8]
drafts = pytest.mark.parametrize("num_drafts", NUM_DRAFTS)


def byte_tokenizer() -> Any:
    """One token a byte (of UTF-8), and a few that hold several characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    vocabulary |= {"ab": 256, "abc": 257, "abca": 258}
    merges = [("a", "b"), ("ab", "c"), ("abc", "a")]
    tiny = Tokenizer(models.BPE(vocabulary, merges))
    tiny.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tiny, clean_up_tokenization_spaces=False)


BYTES = byte_tokenizer()


def brute_force(tokens: list[int], stops: tuple[str, ...], tokenizer: Any) -> tuple[int, str]:
    """Tokens up to the first with which the text holds a stop string; text before the string."""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return end, text[: min(places)]
    return len(tokens), tokenizer.decode(tokens, skip_special_tokens=True)


def check(tokens: list[int], stops: tuple[str, ...], num_drafts: int, tokenizer: Any) -> None:
    params = SamplingParams(max_tokens=len(tokens), stop=stops, ignore_eos=True, logprobs=0)
    output, streamed = run_script(tokens, params, num_drafts, tokenizer)
    kept, text = brute_force(tokens, stops, tokenizer)
    completion = output.outputs[0]
    assert completion.token_ids == tokens[:kept]
    assert completion.text == text
    assert streamed == completion.token_ids, "what was streamed is not what was kept"
    assert completion.logprobs is not None
    assert [e.token_id for e in completion.logprobs] == completion.token_ids
    full = tokenizer.decode(tokens[:kept], skip_special_tokens=True)
    if any(stop in full for stop in stops):
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason in stops
        assert full[len(text) :].startswith(str(completion.stop_reason))
        assert not any(stop in completion.text for stop in stops)
    else:
        assert completion.finish_reason is FinishReason.LENGTH


TEXTS = {
    "plain": ("the cat sat on the mat", ("sat",)),
    "first token": ("stop here", ("s",)),
    "last token": ("here it ends.", (".",)),
    "never": ("nothing to see", ("xyz",)),
    "accents": ("un café noir, s'il vous plaît", ("noir",)),
    "is a split character": ("party 🎉 time", ("🎉",)),
    "after split characters": ("日本語のテキスト。終わり", ("。",)),
    "spans split characters": ("日本語のテキスト。終わり", ("キスト",)),
    "overlaps itself": ("aaaab", ("aaab",)),
    "of several the first": ("one two three four", ("four", "three")),
    "one inside the other": ("say hello world", ("hello world", "llo")),
    "whitespace": ("line one\n\nline two", ("\n\n",)),
}


@drafts
@pytest.mark.parametrize("case", TEXTS.values(), ids=TEXTS)
def test_cut_at_a_stop_string(case: tuple[str, tuple[str, ...]], num_drafts: int) -> None:
    text, stops = case
    check(list(map(int, BYTES.encode(text))), stops, num_drafts, BYTES)


@drafts
def test_cut_inside_a_token(num_drafts: int) -> None:
    """One token brings two stop strings, or ends past one: the text ends before the first."""
    tokens = BYTES.encode("xabcay")
    assert 258 in tokens
    for stops in (("b",), ("c", "b"), ("ca", "bc"), ("a",), ("ay",)):
        check(tokens, stops, num_drafts, BYTES)


@drafts
@pytest.mark.parametrize("seed", range(20))
def test_random_texts_and_stops(seed: int, num_drafts: int) -> None:
    rng = random.Random(seed)
    alphabet = "abé🎉 "
    text = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
    stops = tuple(
        "".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))
    )
    tokens = [t for char in text for t in BYTES.encode(char)] if seed % 2 else BYTES.encode(text)
    check(tokens[:90], stops, num_drafts, BYTES)


@drafts
def test_long_stop_strings_are_found(num_drafts: int) -> None:
    stop = "🎉é" * 6
    check(BYTES.encode("a" * 30 + stop + "after")[:100], (stop,), num_drafts, BYTES)


def test_special_tokens_do_not_hide_a_stop_string() -> None:
    """They are no part of the text, so a stop string may stand around many of them."""
    tokenizer = tiny_tokenizer(128)
    a, b, special = tokenizer.encode("a")[0], tokenizer.encode("b")[0], tokenizer.eos_token_id
    check([a] + [special] * 40 + [b, a, a], ("ab",), 0, tokenizer)


@drafts
def test_stop_string_at_the_very_last_token_counts_as_stop(num_drafts: int) -> None:
    tokens = BYTES.encode("abc")
    output, _ = run_script(
        tokens, SamplingParams(max_tokens=len(tokens), stop=("c",)), num_drafts, BYTES
    )
    assert output.outputs[0].finish_reason is FinishReason.STOP
    assert output.outputs[0].stop_reason == "c"


@drafts
def test_stop_id_inside_accepted_drafts(num_drafts: int) -> None:
    script = [10, 11, 12, 13, 14, 15]
    for stop in script:
        params = SamplingParams(max_tokens=6, stop_token_ids=(stop,), logprobs=0)
        output, streamed = run_script(script, params, num_drafts)
        expected = script[: script.index(stop) + 1]
        assert output.token_ids == streamed == expected
        assert output.outputs[0].stop_reason == stop
        assert [e.token_id for e in output.outputs[0].logprobs or ()] == expected


@drafts
def test_max_tokens_inside_accepted_drafts(num_drafts: int) -> None:
    for limit in range(1, 8):
        output, streamed = run_script(
            list(range(10, 30)), SamplingParams(max_tokens=limit), num_drafts
        )
        assert output.token_ids == streamed == list(range(10, 10 + limit))


def test_stop_needs_a_tokenizer() -> None:
    engine = shared_engine()
    before, engine.tokenizer = engine.tokenizer, None
    try:
        with pytest.raises(RequestError, match="tokenizer"):
            engine.add_request([5], SamplingParams(stop=("a",)))
        with pytest.raises(RequestError, match="tokenizer"):
            engine.add_request("text")
        with pytest.raises(RequestError, match="chat template"):
            engine.add_request([{"role": "user", "content": "hi"}])
    finally:
        engine.tokenizer = before


def test_stop_strings_on_a_real_model_with_and_without_every_technique() -> None:
    tokenizer = shared_engine().tokenizer
    technique_sets = [(), together()]
    num_stopped = 0
    for prompt in mixed_prompts(6):
        full = hf_greedy(tiny_model("llama"), prompt, 24)
        text = tokenizer.decode(full, skip_special_tokens=True)  # type: ignore[union-attr]
        stops = (text[5:7], text[11:14])
        params = SamplingParams(max_tokens=24, stop=stops, ignore_eos=True)
        kept, expected = brute_force(full, stops, tokenizer)
        for techniques in technique_sets:
            (output,) = shared_engine(techniques=techniques).generate([prompt], params)
            assert output.token_ids == full[:kept]
            assert output.text == expected
        num_stopped += kept < len(full)
    assert num_stopped >= 4
