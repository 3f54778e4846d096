"""Training a head on text that its target wrote, and measuring it on text held out.

The target's hidden states are kept from one pass over the text to the next as far as they may take
memory (``kept_states_gib``), and computed again where they do not fit: a pass of the target over a
batch costs little beside writing text one token at a time.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from techniques.draft_heads.corpus import Corpus, Text, TextBatch, batches, frequent_ids
from techniques.draft_heads.files import with_target
from techniques.draft_heads.spec import HeadSpec
from techniques.draft_heads.target import HiddenStates, Target
from techniques.draft_heads.trainees import Trainee, Wanted
from workbench.core.errors import ConfigError

_STEPS_AHEAD = 16  # that the host may be of the device
_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a head is trained.

    Attributes
    ----------
    max_tokens, samples_per_prompt, held_out_fraction
        See :class:`techniques.draft_heads.corpus.WritingPlan`.
    writing_share
        Of ``max_minutes``, how much writing the text may take.
    epochs
        Passes over the text.
    batch_tokens
        Tokens a step, padding included.
    kept_states_gib
        Memory, on the device, for hidden states that later passes over the text read again.
    learning_rate, weight_decay, warmup_fraction, max_grad_norm
        Of AdamW; the rate rises linearly over the warm-up and falls by a cosine to zero.
    """

    max_tokens: int = 256
    samples_per_prompt: int = 4
    held_out_fraction: float = 0.1
    writing_share: float = 0.4
    epochs: int = 10
    batch_tokens: int = 4096
    kept_states_gib: float = 2.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.03
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, is_valid, valid in (
            ("max_tokens", self.max_tokens >= 3, "3 or more"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "1 or more"),
            ("held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1"),
            ("writing_share", 0 < self.writing_share < 1, "between 0 and 1"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_tokens", self.batch_tokens >= 16, "16 or more"),
            ("kept_states_gib", self.kept_states_gib >= 0, "0 or more"),
            ("learning_rate", self.learning_rate > 0, "over 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "between 0 and 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "over 0"),
        ):
            if not is_valid:
                raise ConfigError(f"training.{name}={getattr(self, name)} must be {valid}.")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How long chains of guesses were right on text that the target wrote greedily.

    Estimated without speculating: at every place from which a whole chain fits into the text, how
    many guesses agree with it before the first that does not.

    Attributes
    ----------
    num_places
        Chains.
    accepted_at
        Share of the chains whose first, second, ... guess was reached and right.
    """

    num_places: int
    accepted_at: list[float]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a verification would yield, the target's own included."""
        return 1 + sum(self.accepted_at)

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "num_places": self.num_places,
            "accepted_at": self.accepted_at,
            "mean_accepted_length": self.mean_accepted_length,
        }


@dataclass(slots=True)
class Trained:
    """A head and how it came about."""

    spec: HeadSpec
    module: nn.Module
    losses: list[tuple[int, float]]
    untrained: HeldOut
    trained: HeldOut
    num_steps: int
    stopped_early: bool
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _TargetSays:
    """What the target would write behind each token of a batch.

    Attributes
    ----------
    final : Tensor[B, S, H]
        Hidden states that it is drawn from.
    likeliest_counts : Tensor[B, S] bool
        Whether the likeliest token can be proposed.
    probs : Tensor[B, S, draft_vocab] float32
        Over the draft vocabulary.
    """

    final: torch.Tensor
    likeliest_counts: torch.Tensor
    probs: torch.Tensor


class Trainer:
    """Trains one head.

    Parameters
    ----------
    target_name
        For the head's config.
    stop_at
        ``time.monotonic()`` at which training ends whatever is left; None lets it finish.
    report
        Takes lines of progress.
    """

    def __init__(
        self,
        trainee: Trainee,
        target: Target,
        options: TrainingOptions,
        *,
        seed: int = 0,
        target_name: str = "",
        stop_at: float | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.trainee, self.target, self.options = trainee, target, options
        self.seed, self.name = seed, target_name
        self.stop_at, self.report = stop_at, report
        self.device = target.decoder.device
        self.lm_head = target.lm_head()
        self._kept: dict[int, HiddenStates] = {}  # by the first text of a batch
        self._kept_bytes = 0

    def run(self, corpus: Corpus) -> Trained:
        """Train to the end, or as long as there is time."""
        # cuDNN plans every shape anew, and texts have hundreds of lengths.
        with sdpa_kernel(list(_ATTENTION)):
            return self._run(corpus)

    def _run(self, corpus: Corpus) -> Trained:
        began = time.monotonic()
        spec, module = self._make(corpus.train)
        untrained = self.measure(module, corpus.held_out)
        self.report(f"untrained: {_figures(untrained)}")
        measured = time.monotonic()
        losses, steps, stopped = self._train(module, corpus, 2 * (measured - began))
        trained_at = time.monotonic()
        trained = self.measure(module, corpus.held_out)
        self.report(f"trained: {_figures(trained)}")
        return Trained(
            spec=spec,
            module=module,
            losses=losses,
            untrained=untrained,
            trained=trained,
            num_steps=steps,
            stopped_early=stopped,
            seconds={
                "training": trained_at - measured,
                "measuring": measured - began + time.monotonic() - trained_at,
            },
        )

    def _make(self, texts: list[Text]) -> tuple[HeadSpec, nn.Module]:
        vocab = self.target.spec.vocab_size
        size = self.trainee.draft_vocab_size or vocab
        if size > vocab:
            self.report(f"draft vocabulary: all {vocab} ids of the target, fewer than {size}")
            size = vocab
        spec = with_target(self.trainee.spec(self.target, size), self.name, self.target)
        d2t = None
        self.draft_ids = torch.arange(size, device=self.device)
        if spec.has_reduced_vocab:
            ids = frequent_ids(texts, size, vocab)
            d2t = (ids - torch.arange(size)).to(self.device)
            self.draft_ids = ids.to(self.device)
        self.to_draft = torch.full((vocab,), -1, dtype=torch.int64, device=self.device)
        self.to_draft[self.draft_ids] = torch.arange(size, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return spec, self.trainee.make(spec, self.target, d2t)

    # -- training -----------------------------------------------------------------------------

    def _train(
        self, module: nn.Module, corpus: Corpus, reserve_s: float
    ) -> tuple[list[tuple[int, float]], int, bool]:
        """Losses by step (means of the steps since the last), steps, whether time ran out."""
        options = self.options
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            fused=self.device.type == "cuda",
        )
        text = list(batches(corpus.train, options.batch_tokens, self.device))
        total = len(text) * options.epochs
        every = max(1, total // 50)
        losses: list[tuple[int, float]] = []
        began, step, recent, said = time.monotonic(), 0, [], time.monotonic()
        # Measuring at the end takes about as long as it did at the start.
        stop_at = None if self.stop_at is None else self.stop_at - reserve_s
        for batch in self._epochs(text):
            done = step / total
            if stop_at is not None and step:
                # The rate falls by the time that is left where that ends training sooner.
                done = max(done, (time.monotonic() - began) / max(1e-9, stop_at - began))
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * self._rate(done)
            loss = self._loss(module, batch)
            step += 1
            if loss is None:
                continue
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), options.max_grad_norm)
            optimizer.step()
            recent.append(loss.detach())
            if self.device.type == "cuda" and step % _STEPS_AHEAD == 0:
                torch.cuda.synchronize()  # else the clock would run ahead of the device
            if step % every == 0 or step == total:
                losses.append((step, float(torch.stack(recent).mean())))
                recent = []
                if time.monotonic() - said > 2 or step == total:
                    said = time.monotonic()
                    self.report(
                        f"step {step} of {total}: loss {losses[-1][1]:.4f}, {said - began:.0f} s"
                    )
        if recent:
            losses.append((step, float(torch.stack(recent).mean())))
        if step < total:
            self.report(f"out of time after {step} of {total} steps")
        return losses, step, step < total

    def _epochs(self, text: list[TextBatch]) -> Iterator[TextBatch]:
        for epoch in range(self.options.epochs):
            order = list(text)
            random.Random(self.seed * 1009 + epoch).shuffle(order)
            yield from order

    def _rate(self, done: float) -> float:
        """Share of the learning rate when this share of the training is done."""
        warmup = self.options.warmup_fraction
        if done < warmup:
            return max(0.05, done / warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))

    def _loss(self, module: nn.Module, batch: TextBatch) -> torch.Tensor | None:
        """Of a batch, over all steps of the chain; None where it is too short for any.

        Nothing here waits for the device: places that do not count are weighed with nothing, and
        not left out.
        """
        hidden = self._hidden(module, batch)
        num_steps = self.trainee.num_steps
        losses, weights = list[torch.Tensor](), list[torch.Tensor]()
        with self._autocast():
            says = self._says(hidden)
            features = self.trainee.features(module, hidden, _longer(batch, num_steps), num_steps)
            for step, of_step in enumerate(features):
                bases = self._bases(batch, says, step)
                if bases is None:
                    continue
                counts, wanted, following = bases
                own = of_step[:, : counts.shape[1]]
                loss = self.trainee.loss(self.trainee.logits(module, step, own), wanted)
                beside = self.trainee.feature_loss(own, following)
                loss = loss if beside is None else loss + beside
                num = counts.sum()
                losses.append(torch.where(counts, loss, 0.0).sum() / num.clamp(min=1))
                weights.append((num > 0) * self.trainee.options.decay**step)
        if not losses:
            return None
        weight = torch.stack(weights)
        return (weight * torch.stack(losses)).sum() / weight.sum().clamp(min=1e-9)

    @torch.no_grad()
    def _says(self, hidden: HiddenStates) -> _TargetSays:
        """What the target would write behind every token of a batch."""
        logits = torch.nn.functional.linear(hidden.final, self.lm_head)
        probs = logits[..., self.draft_ids].float().softmax(-1)
        return _TargetSays(hidden.final, self.to_draft[logits.argmax(-1)] >= 0, probs)

    @torch.no_grad()
    def _bases(
        self, batch: TextBatch, says: _TargetSays, step: int
    ) -> tuple[torch.Tensor, Wanted, torch.Tensor] | None:
        """Which of the first ``N`` tokens of each text are bases of a step, bool ``[B, N]``, what
        they are to guess, and the hidden states ``[B, N, H]`` that the target drew it from; None
        where the text is too short for any.

        Left out are bases whose token, or the target's likeliest, is not in the draft vocabulary.
        """
        shift, size = 2 + step, batch.token_ids.shape[1]
        if shift >= size:
            return None
        draft_ids = self.to_draft[batch.token_ids[:, shift:]]
        source = slice(shift - 1, size - 1)
        counts = batch.is_output[:, shift:] & (draft_ids >= 0) & says.likeliest_counts[:, source]
        wanted = Wanted(draft_ids.clamp(min=0), says.probs[:, source])
        return counts, wanted, says.final[:, source]

    def _hidden(self, module: nn.Module, batch: TextBatch) -> HiddenStates:
        key = id(batch.texts[0])  # of one batch in every pass over the text
        states = self._kept.get(key)
        if states is None:
            spec: HeadSpec = module.spec  # type: ignore[assignment]
            states = self.target.hidden_states(
                [text.token_ids for text in batch.texts], self.trainee.layers(spec)
            )
            size = states.final.nbytes + states.kept.nbytes
            if self._kept_bytes + size <= self.options.kept_states_gib * 2**30:
                self._kept[key] = states
                self._kept_bytes += size
        return states

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )

    # -- measuring ----------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, module: nn.Module, texts: list[Text]) -> HeldOut:
        """How long chains are right on texts that the target wrote greedily.

        The text's own tokens are fed on: as far as a chain is right they are its own.
        """
        num_steps = self.trainee.num_steps
        reached = torch.zeros(num_steps, dtype=torch.int64, device=self.device)
        places = 0
        for batch in batches(texts, self.options.batch_tokens, self.device):
            size = batch.token_ids.shape[1]
            last = 1 + num_steps  # a chain's last guess is of this token behind its base
            if last >= size:
                continue
            usable = torch.zeros_like(batch.is_output)
            usable[:, :-last] = batch.is_output[:, 1 : 1 + size - last]
            usable[:, :-last] &= batch.is_output[:, last:]
            base = usable.flatten().nonzero().squeeze(1)
            if not len(base):
                continue
            places += len(base)
            hidden = self._hidden(module, batch)
            right = torch.ones(len(base), dtype=torch.bool, device=self.device)
            with self._autocast():
                features = self.trainee.features(
                    module, hidden, _longer(batch, num_steps), num_steps
                )
                for step, of_step in enumerate(features):
                    flat = of_step.reshape(-1, of_step.shape[-1])[base]
                    guessed = self.draft_ids[self.trainee.logits(module, step, flat).argmax(-1)]
                    right &= guessed == batch.token_ids.flatten()[base + 2 + step]
                    reached[step] += right.sum()
        if not places:
            raise ConfigError(
                f"no text that is held out is long enough for chains of {num_steps} guesses. Raise "
                "training.max_tokens, or give more prompts."
            )
        return HeldOut(places, [count / places for count in reached.tolist()])


def _longer(batch: TextBatch, num_steps: int) -> torch.Tensor:
    """The batch's ids with room behind for the tokens that later steps read; ``[B, S + steps]``."""
    return torch.nn.functional.pad(batch.token_ids, (0, num_steps))


def _figures(held_out: HeldOut) -> str:
    by_step = ", ".join(f"{share:.3f}" for share in held_out.accepted_at)
    return (
        f"mean accepted length {held_out.mean_accepted_length:.3f} on held-out text "
        f"({held_out.num_places} places; right up to each guess: {by_step})"
    )
