"""From prompts to a saved head, in three parts: write the text, train, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from techniques.draft_heads.corpus import Corpus, WritingPlan, write_corpus
from techniques.draft_heads.files import save_head
from techniques.draft_heads.target import Target
from techniques.draft_heads.trainees import Trainee
from techniques.draft_heads.training import Trained, Trainer, TrainingOptions
from workbench.engine.engine import Engine
from workbench.models.decoder import Decoder

Report = Callable[[str], None]


class HeadProgram:
    """What the command ``train_head`` drives.

    ``began`` is ``time.monotonic()`` at the start of the command, and ``budget_s`` how long it may
    take, None as long as it wants.
    """

    Options = TrainingOptions

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options

    def write(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        seed: int,
        began: float,
        budget_s: float | None,
        report: Report,
    ) -> Corpus:
        """Let the target answer the prompts."""
        options = self.options
        plan = WritingPlan(
            max_tokens=options.max_tokens,
            samples_per_prompt=options.samples_per_prompt,
            held_out_fraction=options.held_out_fraction,
            seed=seed,
            chunk_size=4 * engine.parts.info["max_num_seqs"],
        )
        share = None if budget_s is None else options.writing_share * budget_s
        return write_corpus(
            engine,
            prompts,
            plan,
            may_go_on=lambda: share is None or time.monotonic() - began < share,
            report=report,
        )

    def train(
        self,
        decoder: Decoder,
        trainee: Trainee,
        corpus: Corpus,
        seed: int,
        name: str,
        began: float,
        budget_s: float | None,
        report: Report,
    ) -> Trained:
        """Train a head on the text."""
        trainer = Trainer(
            trainee,
            Target(decoder),
            self.options,
            seed=seed,
            target_name=name,
            stop_at=None if budget_s is None else began + budget_s,
            report=report,
        )
        return trainer.run(corpus)

    def save(self, trained: Trained, folder: Path, dtype: torch.dtype) -> None:
        """Write the head in its published layout."""
        save_head(folder, trained.spec, trained.module.state_dict(), dtype)

    def describe(self, corpus: Corpus) -> dict[str, Any]:
        """Of a corpus, for the record."""
        train, held_out = corpus.num_output_tokens
        return {
            "num_texts": len(corpus.train),
            "num_output_tokens": train,
            "num_held_out_texts": len(corpus.held_out),
            "num_held_out_output_tokens": held_out,
        }

    def results(self, trained: Trained) -> dict[str, Any]:
        """Of a training, for the record."""
        return {
            "losses": [{"step": step, "loss": loss} for step, loss in trained.losses],
            "num_steps": trained.num_steps,
            "stopped_early": trained.stopped_early,
            "num_parameters": sum(p.numel() for p in trained.module.parameters()),
            "held_out": {
                "untrained": trained.untrained.to_dict(),
                "trained": trained.trained.to_dict(),
            },
        }
