"""Text that the target wrote itself, to train heads on: they are to guess what it says, not what
others wrote (Medusa and EAGLE do the same)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what the target wrote after it, as one list of ids."""

    token_ids: list[int]
    num_prompt_tokens: int

    @property
    def output(self) -> list[int]:
        """What the target wrote."""
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What heads are trained and measured on; no prompt is in both."""

    train: list[Text]
    held_out: list[Text]

    @property
    def num_output_tokens(self) -> tuple[int, int]:
        """Tokens that the target wrote, in either part."""
        return (
            sum(len(text.output) for text in self.train),
            sum(len(text.output) for text in self.held_out),
        )


@dataclass(frozen=True, slots=True)
class WritingPlan:
    """How prompts are answered.

    Attributes
    ----------
    max_tokens
        Of an answer.
    samples_per_prompt
        Answers to each prompt: the first greedy, the others drawn at temperature 1.
    held_out_fraction
        Share of the prompts, at least one, that are answered greedily and never trained on.
    chunk_size
        Answers between two looks at the clock.
    """

    max_tokens: int
    samples_per_prompt: int
    held_out_fraction: float
    seed: int
    chunk_size: int = 256

    def split(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Indices of prompts to train on and to hold out, by the seed."""
        if len(prompts) < 2:
            raise ConfigError(
                f"there are {len(prompts)} prompts; one to train on and one to hold out are the "
                "least. Name more in data=..."
            )
        order = list(range(len(prompts)))
        random.Random(self.seed).shuffle(order)
        count = min(len(prompts) - 1, max(1, round(self.held_out_fraction * len(prompts))))
        return order[count:], order[:count]


def write_corpus(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    plan: WritingPlan,
    *,
    may_go_on: Callable[[], bool] = lambda: True,
    report: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Let the target answer the prompts, those held out first.

    Parameters
    ----------
    may_go_on
        Asked before each chunk of answers to train on but the first.

    Raises
    ------
    ConfigError
        There are too few prompts, or no answer is long enough to learn from.
    """
    to_train, to_hold_out = plan.split(prompts)
    jobs = [
        (prompts[index], sample) for sample in range(plan.samples_per_prompt) for index in to_train
    ]
    held_out = _answers(engine, [(prompts[i], 0) for i in to_hold_out], plan)
    train: list[Text] = []
    for start in range(0, len(jobs), plan.chunk_size):
        if start and not may_go_on():
            report(f"text: out of time after {start} of {len(jobs)} answers")
            break
        train += _answers(engine, jobs[start : start + plan.chunk_size], plan, start)
        report(f"text: {len(train)} of {len(jobs)} answers")
    corpus = Corpus(_learnable(train), _learnable(held_out))
    if not corpus.train or not corpus.held_out:
        raise ConfigError(
            "the target's answers are too short to learn from: none has three tokens to train on, "
            "or none that is held out. Raise training.max_tokens, or give other prompts."
        )
    return corpus


def _learnable(texts: Sequence[Text]) -> list[Text]:
    return [text for text in texts if len(text.output) >= 3]


def _answers(
    engine: Engine, jobs: Sequence[tuple[Sequence[int], int]], plan: WritingPlan, first: int = 0
) -> list[Text]:
    params = [
        SamplingParams(max_tokens=plan.max_tokens)
        if sample == 0
        else SamplingParams(
            max_tokens=plan.max_tokens, temperature=1.0, seed=plan.seed * 1_000_003 + first + i
        )
        for i, (_, sample) in enumerate(jobs)
    ]
    outputs = engine.generate([list(prompt) for prompt, _ in jobs], params)
    failed = [output.error for output in outputs if output.error]
    if failed:
        raise ConfigError(f"{len(failed)} prompts could not be answered; the first: {failed[0]}")
    return [
        Text([*prompt, *output.token_ids], len(prompt))
        for (prompt, _), output in zip(jobs, outputs, strict=True)
    ]


def frequent_ids(texts: Sequence[Text], count: int, vocab_size: int) -> torch.Tensor:
    """The ``count`` ids that the target wrote most often, in rising order, ``[count]`` int64.

    Where it wrote fewer different ones, the lowest others fill up.
    """
    counts = Counter(i for text in texts for i in text.output)
    ids = [i for i, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:count]
    chosen = set(ids)
    rest = (i for i in range(vocab_size) if i not in chosen)
    while len(ids) < count:
        ids.append(next(rest))
    return torch.tensor(sorted(ids))


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts padded at the end.

    Attributes
    ----------
    texts
        Without padding.
    token_ids : Tensor[B, S] int64
    is_output : Tensor[B, S] bool
        Where the target wrote the token.
    """

    texts: list[Text]
    token_ids: torch.Tensor
    is_output: torch.Tensor


def batches(
    texts: Sequence[Text], max_tokens: int, device: torch.device, seed: int | None = None
) -> Iterator[TextBatch]:
    """All texts once, those of like length together, in a random order where there is a seed.

    A batch has ``max_tokens`` tokens at most, padding included, or a single text.
    """
    ordered = sorted(texts, key=lambda text: len(text.token_ids))
    groups: list[list[Text]] = []
    for text in ordered:
        if groups and (len(groups[-1]) + 1) * len(text.token_ids) <= max_tokens:
            groups[-1].append(text)
        else:
            groups.append([text])
    if seed is not None:
        random.Random(seed).shuffle(groups)
    for group in groups:
        longest = max(len(text.token_ids) for text in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        is_output = torch.zeros(len(group), longest, dtype=torch.bool)
        for row, text in enumerate(group):
            ids[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
            is_output[row, text.num_prompt_tokens : len(text.token_ids)] = True
        yield TextBatch(group, ids.to(device), is_output.to(device))
