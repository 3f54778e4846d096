"""How published checkpoints write a multi-token-prediction module down."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of a module's own tensors, and what the layout implies of its use.

    The decoder layer's names, and those below, follow the module's own prefix; ``.weight`` is left
    out.

    Attributes
    ----------
    name
        For messages.
    stack
        The module's prefix, with ``{index}``.
    token_norm, hidden_norm, projection, final_norm
        Norms of the next token's embedding and of the hidden state, the layer that joins them, and
        the norm in front of the LM head.
    embedding_first
        Whether the embedding is the first half of the projection's input.
    features_are_normed
        Whether the hidden states that it reads are those after the final norm: the target's of the
        first draft, and its own of each draft after that.
    shared
        Copies of the target's embedding and LM head, which are not read.
    """

    name: str
    stack: str
    token_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    embedding_first: bool
    features_are_normed: bool
    shared: tuple[str, ...] = ()

    def modules(self, names: Iterable[str]) -> list[int]:
        """Indices of the modules that a checkpoint with these tensors has, in order."""
        before, _, behind = self.stack.partition("{index}")
        tail = f"{behind}{self.projection}.weight"
        pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(tail)}")
        return sorted(int(found[1]) for found in map(pattern.fullmatch, names) if found)

    @property
    def example(self) -> str:
        """Name of a tensor by which a module is found."""
        return f"{self.stack.replace('{index}', '*')}{self.projection}.weight"


#: DeepSeek-V3 (README_WEIGHTS.md of its repository): a layer behind the decoder's last. Its main
#: model hands on hidden states after the final norm, and SGLang's ``deepseek_nextn.py`` and vLLM's
#: ``deepseek_mtp.py`` (since its change 45895) also those between drafts.
DEEPSEEK = Layout(
    name="DeepSeek-V3",
    stack="model.layers.{index}.",
    token_norm="enorm",
    hidden_norm="hnorm",
    projection="eh_proj",
    final_norm="shared_head.norm",
    embedding_first=True,
    features_are_normed=True,
    shared=("embed_tokens", "shared_head.head"),
)
#: MiMo-7B: a stack of its own. vLLM's ``mimo.py`` hands on what leaves the last layer, before the
#: final norm; hidden states between drafts are of that kind too.
MIMO = Layout(
    name="MiMo",
    stack="model.mtp_layers.{index}.",
    token_norm="token_layernorm",
    hidden_norm="hidden_layernorm",
    projection="input_proj",
    final_norm="final_layernorm",
    embedding_first=False,
    features_are_normed=False,
)
LAYOUTS = (DEEPSEEK, MIMO)
