"""Drafts by a smaller model with the target's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.core.errors import ConfigError
from workbench.core.step import SchedulerOutput
from workbench.engine.draft_runner import DraftRunner, FilledBlocks, Span
from workbench.engine.model_drafter import ModelDrafter, ModelDrafterConfig, blocks_of
from workbench.models.decoder import Decoder
from workbench.models.source import ModelSource, open_source
from workbench.slots.drafter import DrafterBinding, DrafterHost
from workbench.slots.kv_pool import KVShape


@dataclass(frozen=True, slots=True)
class DraftModelConfig(ModelDrafterConfig):
    """Options of :class:`DraftModel`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    model
        A catalogue name, a folder, a ``.gguf`` file or a Hub id.
    hf_config
        Content of a ``config.json``, for random weights without a folder.
    """

    num_draft_tokens: int = 5
    model: str | None = None
    hf_config: Any = None


class DraftModel(ModelDrafter):
    """A model of its own, whose KV lies in the same blocks as the target's.

    So a prefix that requests share is shared for the drafts too. What it has run of a request it
    keeps by block: a cached prefix for which nobody asked for drafts is run once more.
    """

    Config = DraftModelConfig
    config: DraftModelConfig
    most_missing = 2  # where all drafts held, the last of them and the token after it

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__(config)
        if not config.model and config.hf_config is None:
            raise ConfigError(
                "engine.drafter.model names no model that could draft. Give a smaller one with the "
                "target's vocabulary: a folder, a catalogue name or a Hub id."
            )
        self._model: Decoder | None = None
        #: By request, how many tokens it knew, and the drafts after them that were run.
        self._drafted: dict[str, tuple[int, list[int]]] = {}

    # -- weights -----------------------------------------------------------------------------------

    def load(self, host: DrafterHost) -> None:
        given = self.config.hf_config
        source = open_source(
            self.config.model or "draft",
            weights=host.weights,
            hf_config=dict(given) if isinstance(given, Mapping) else given,
            models_dir=host.models_dir,
        )
        self._model = model = host.load_decoder(source.config)
        _check_vocabulary(source, model, host)
        self.max_positions = model.spec.max_position_embeddings

    @property
    def weight_bytes(self) -> int:
        model = self._model
        return 0 if model is None else model.weight_bytes_actual + model.rope_bytes

    def kv_shape(self) -> KVShape | None:
        return None if self._model is None else self._model.spec.kv_shape(self._model.dtype)

    # -- steps -------------------------------------------------------------------------------------

    def make_runner(self, binding: DrafterBinding) -> DraftRunner:
        model = self._model
        assert model is not None, "a drafter is loaded before it is bound"
        self._filled = FilledBlocks(binding.pool.num_blocks, binding.pool.block_size)
        return DraftRunner(
            model,
            binding.table,
            binding.pool,
            binding.make_attention(model.spec.attention_layers, binding.pool),
            binding.vocab_size,
        )

    def note_plan(self, plan: SchedulerOutput) -> None:
        self._filled.note_plan(plan)

    def num_run(self, request_id: str, row: int, known: np.ndarray) -> int:
        most = len(known) - 1
        count = self._filled.length(blocks_of(self._binding, row), most)
        end, drafts = self._drafted.get(request_id, (0, []))
        if count == end:  # and drafts that came true
            for token in drafts:
                if count >= most or token != known[count]:
                    break
                count += 1
        return count

    def note_run(self, request_id: str, span: Span, drafts: list[int]) -> None:
        blocks = blocks_of(self._binding, span.row)
        self._filled.fill(blocks, self._filled.length(blocks, span.start), span.end)
        self._drafted[request_id] = (span.end, drafts[:-1])

    def finish(self, request_id: str) -> None:
        self._drafted.pop(request_id, None)


def _check_vocabulary(source: ModelSource, model: Decoder, host: DrafterHost) -> None:
    """Ids must mean the same to both; that one of them is padded to more does no harm.

    Raises
    ------
    ConfigError
        They do not.
    """
    target = host.target.spec
    theirs, ours = _vocabulary(source), None
    if host.target_folder is not None:
        ours = _vocabulary(ModelSource(host.target_folder.name, host.target_folder, ""))
    if theirs is not None and ours is not None:
        if theirs == ours:
            return
        differ = sum(ours.get(token) != i for token, i in theirs.items())
        what = f"{differ} of its {len(theirs)} tokens have another id, or none, in the target's"
    elif model.spec.vocab_size == target.vocab_size:
        return
    else:
        what = (
            f"it has {model.spec.vocab_size} ids and the target {target.vocab_size}, and without "
            "both tokenizers nobody can say what they have in common"
        )
    raise ConfigError(
        f"engine.drafter.model={source.name!r} cannot draft for this target, since their "
        f"vocabularies differ: {what}. Choose a smaller model of the target's own family, such as "
        "Qwen2.5-Coder-0.5B for Qwen2.5-Coder-1.5B, or engine/drafter=ngram, which needs none."
    )


def _vocabulary(source: ModelSource) -> dict[str, int] | None:
    tokenizer = source.tokenizer()
    return None if tokenizer is None else dict(tokenizer.get_vocab())
