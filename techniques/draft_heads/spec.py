"""What a draft head is: one frozen description, read from and written to published configs.

Layouts are those of FasterDecoding/Medusa (``medusa_num_heads``, ...) and SafeAILab/EAGLE, which
vLLM reads as well: a Llama config of one layer, for EAGLE-3 with ``draft_vocab_size``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.models.families import spec_from_hf
from workbench.models.spec import ModelSpec

#: Kinds of heads, by the name that configs of this project have for them.
KINDS = ("eagle", "eagle3", "medusa")
#: Key of a head's ``config.json`` that names the layers whose hidden states EAGLE-3 reads, as in
#: vLLM: ``i`` is what enters layer ``i``.
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
#: Key under which a head says what it was trained for.
TRAINED_FOR = "trained_for"
#: Model types with the layer that heads have; they differ in nothing that a head holds.
_LLAMA_LIKE = ("llama",)


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A draft head of any kind.

    Attributes
    ----------
    kind
        One of :data:`KINDS`.
    hidden_size, vocab_size
        Of the target.
    draft_vocab_size
        Ids that it can propose; ``vocab_size`` where it proposes all, and then it has no map.
    num_heads, num_layers, shares_lm_head
        Of Medusa: heads, residual blocks a head, and whether blocks end in the target's own output
        layer (``original_lm_head`` in vLLM) instead of one each.
    decoder
        Of EAGLE: its one decoder layer, described as a Llama of one layer.
    fc_bias
        Of EAGLE: whether the layer that joins its inputs has a bias.
    aux_layers
        Of EAGLE-3: whose hidden states it reads (see ``workbench.slots.attention.KeptHidden``).
    trained_for
        Name and fingerprint of the target, where it was trained here.
    """

    kind: str
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    num_heads: int = 1
    num_layers: int = 1
    shares_lm_head: bool = False
    decoder: ModelSpec | None = None
    fc_bias: bool = False
    aux_layers: tuple[int, ...] = ()
    trained_for: Mapping[str, str] = dataclasses.field(default_factory=dict)
    llama: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_reduced_vocab(self) -> bool:
        """Whether it proposes some of the target's ids only."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def layer(self) -> ModelSpec:
        """EAGLE's decoder layer."""
        assert self.decoder is not None, f"a head of kind {self.kind} has no decoder layer"
        return self.decoder

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_target_layers: int = 0) -> HeadSpec:
        """Read the content of a head's ``config.json``.

        Parameters
        ----------
        num_target_layers
            Layers of the target, by which EAGLE-3 chooses those it reads where its config names
            none.

        Raises
        ------
        WorkbenchError
            The layout is not known, or a key is missing or does not fit.
        """
        try:
            kind = _kind_of(config)
            if kind == "medusa":
                return _medusa(config)
            return _eagle(config, kind, num_target_layers)
        except KeyError as error:
            raise WorkbenchError(f"the head's config.json has no key {error}.") from error

    def to_config(self) -> dict[str, Any]:
        """Content of a ``config.json`` that :meth:`from_config` and other engines read."""
        out: dict[str, Any] = {TRAINED_FOR: dict(self.trained_for)} if self.trained_for else {}
        if self.kind == "medusa":
            out |= {
                "architectures": ["MedusaModel"],
                "model_type": "medusa",
                "medusa_num_heads": self.num_heads,
                "medusa_num_layers": self.num_layers,
                "hidden_size": self.hidden_size,
                "vocab_size": self.vocab_size,
                "original_lm_head": self.shares_lm_head,
            }
            if self.has_reduced_vocab:
                out["draft_vocab_size"] = self.draft_vocab_size
            return out
        out = {**self.llama, **out, "num_hidden_layers": 1, "bias": self.fc_bias}
        if self.kind == "eagle":
            return {**out, "architectures": ["LlamaForCausalLMEagle"]}
        return {
            **out,
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": self.draft_vocab_size,
            AUX_LAYERS: list(self.aux_layers),
        }


def eagle3_layers(num_layers: int) -> tuple[int, int, int]:
    """Whose hidden states EAGLE-3 reads in a target of so many layers: 2, half and the third last.

    As in SafeAILab/EAGLE and vLLM, ``i`` is the residual stream that *enters* layer ``i``, so the
    output of the first ``i`` layers together. In targets of less than six layers some are alike.
    """
    low, middle, high = 2, num_layers // 2, num_layers - 3
    first, second, third = sorted(min(num_layers, max(1, i)) for i in (low, middle, high))
    return first, second, third


def _kind_of(config: Mapping[str, Any]) -> str:
    names = " ".join(config.get("architectures") or ())
    if "medusa_num_heads" in config:
        return "medusa"
    if "Eagle3" in names or "draft_vocab_size" in config:
        return "eagle3"
    if "eagle" in names.lower() or config.get("num_hidden_layers") == 1:
        return "eagle"
    raise WorkbenchError(
        f"this is no draft head: architectures {names or '(none)'} with "
        f"{config.get('num_hidden_layers', 'no')} layers. Valid: a config.json with "
        "medusa_num_heads (Medusa), of LlamaForCausalLMEagle3 with draft_vocab_size (EAGLE-3), or "
        "of a Llama of one layer (EAGLE)."
    )


def _medusa(config: Mapping[str, Any]) -> HeadSpec:
    vocab = int(config["vocab_size"])
    spec = HeadSpec(
        kind="medusa",
        hidden_size=int(config["hidden_size"]),
        vocab_size=vocab,
        draft_vocab_size=int(config.get("draft_vocab_size") or vocab),
        num_heads=int(config["medusa_num_heads"]),
        num_layers=int(config["medusa_num_layers"]),
        shares_lm_head=bool(config.get("original_lm_head", False)),
        trained_for=dict(config.get(TRAINED_FOR) or {}),
    )
    if spec.num_heads < 1 or spec.num_layers < 1 or not 1 <= spec.draft_vocab_size <= vocab:
        raise WorkbenchError(
            f"medusa_num_heads={spec.num_heads} and medusa_num_layers={spec.num_layers} must be 1 "
            f"or more, and draft_vocab_size={spec.draft_vocab_size} 1 to {vocab}."
        )
    return spec


def _eagle(config: Mapping[str, Any], kind: str, num_target_layers: int) -> HeadSpec:
    model_type = config.get("model_type", "llama")
    if model_type not in _LLAMA_LIKE:
        raise UnsupportedError(
            f"a head of model_type {model_type!r} cannot be read. Valid: {', '.join(_LLAMA_LIKE)}."
        )
    for key in ("norm_before_residual", "norm_before_fc"):
        if config.get(key):
            raise UnsupportedError(f"heads with {key}=true cannot be read.")
    llama = {k: v for k, v in config.items() if k not in ("bias", TRAINED_FOR, AUX_LAYERS)}
    llama |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    llama.pop("auto_map", None)
    decoder = spec_from_hf(llama)
    vocab = decoder.vocab_size
    draft_vocab = int(config.get("draft_vocab_size") or vocab) if kind == "eagle3" else vocab
    if not 1 <= draft_vocab <= vocab:
        raise WorkbenchError(f"draft_vocab_size={draft_vocab} must be 1 to {vocab}.")
    target_size = config.get("target_hidden_size", decoder.hidden_size)
    if target_size != decoder.hidden_size:
        raise UnsupportedError(
            f"target_hidden_size={target_size} differs from hidden_size={decoder.hidden_size}: "
            "heads of another width than their target cannot be read."
        )
    return HeadSpec(
        kind=kind,
        hidden_size=decoder.hidden_size,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        decoder=decoder,
        fc_bias=bool(config.get("bias", kind == "eagle")),
        aux_layers=_aux_layers(config, num_target_layers) if kind == "eagle3" else (),
        trained_for=dict(config.get(TRAINED_FOR) or {}),
        llama={k: v for k, v in llama.items() if k != "draft_vocab_size"},
    )


def _aux_layers(config: Mapping[str, Any], num_target_layers: int) -> tuple[int, ...]:
    named = config.get(AUX_LAYERS)
    if named is not None:
        return tuple(int(i) for i in named)
    nested = config.get("eagle_config") or {}
    if nested.get(AUX_LAYERS):
        raise UnsupportedError(
            f"eagle_config.{AUX_LAYERS} is counted differently by different engines. Write the "
            f"indices as {AUX_LAYERS} at the top of config.json: i is what enters layer i."
        )
    if num_target_layers < 1:
        raise WorkbenchError(f"the head's config.json has no {AUX_LAYERS}, and no target is known.")
    return eagle3_layers(num_target_layers)
