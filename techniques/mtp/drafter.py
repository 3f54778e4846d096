"""Drafts by the module with which the target was trained to predict further tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from techniques.eagle.drafter import HeadDrafter, HeadDrafterConfig
from techniques.mtp.layouts import DEEPSEEK, LAYOUTS, MIMO, Layout
from techniques.mtp.model import MtpModel, parameters
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.models.checkpoint import Checkpoint
from workbench.models.decoder import Decoder
from workbench.models.families import Family, family_of
from workbench.models.random_weights import RandomWeights
from workbench.slots.drafter import DrafterHost


@dataclass(frozen=True, slots=True)
class MtpConfig(HeadDrafterConfig):
    """Options of :class:`Mtp`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step; of a tree, nodes that are verified.
    module
        Folder whose checkpoint holds the module; None: the target's own. Not read where the
        module is drawn.
    random_module
        Draw a module for a target that has none. With random weights a target that has one gets
        it drawn anyway.
    """

    num_draft_tokens: int = 3
    module: str | None = None
    random_module: bool = False


class Mtp(HeadDrafter):
    """Drafts by a multi-token-prediction module, applied again for each further draft.

    Of a checkpoint with several modules the first is used.
    """

    Config = MtpConfig
    config: MtpConfig

    def load(self, host: DrafterHost) -> None:
        target: Decoder = host.target
        family = family_of({"architectures": [target.spec.architecture]})
        if host.weights == "random" or self.config.random_module:
            self._model = self._draw(host, family)
            return
        folder = self._folder(host)
        checkpoint = Checkpoint(folder, family)
        layout, index = _find_module(checkpoint)
        _check_module(checkpoint, target, family, layout, index)
        self._model = MtpModel(target, family.names, layout, index, checkpoint, 1)
        checkpoint.release()

    def _folder(self, host: DrafterHost) -> Path:
        if self.config.module is not None:
            return Path(self.config.module).expanduser()
        if host.target_folder is None:
            raise ConfigError(
                "the target has no folder to read its multi-token-prediction module from. Name one "
                "that holds the module with engine.drafter.module=..."
            )
        return host.target_folder

    def _draw(self, host: DrafterHost, family: Family) -> MtpModel:
        """A random module of the target's layout."""
        target: Decoder = host.target
        if not target.spec.num_prediction_layers and not self.config.random_module:
            raise ConfigError(
                "this model has no multi-token-prediction module: its config.json has no "
                "num_nextn_predict_layers. Take a model that has one (DeepSeek-V3's layout, "
                "MiMo-7B); or draw a random module, which only shows what drafting costs, with "
                f"engine.drafter.random_module=true; {_OTHERS}"
            )
        layout = MIMO if target.spec.architecture.startswith("MiMo") else DEEPSEEK
        index = 0 if layout is MIMO else target.spec.num_layers
        source = RandomWeights(target.spec, host.seed, target.dtype, target.device)
        return MtpModel(target, family.names, layout, index, source, 1)


_OTHERS = (
    "or choose a drafter that works with any model: engine/drafter=ngram, suffix, lookahead or "
    "layer_skip."
)


def _find_module(checkpoint: Checkpoint) -> tuple[Layout, int]:
    """Layout and index of a checkpoint's first module.

    Raises
    ------
    ConfigError
        It has none.
    """
    for layout in LAYOUTS:
        if found := layout.modules(checkpoint.names):
            return layout, found[0]
    known = " or ".join(f"{layout.example} ({layout.name})" for layout in LAYOUTS)
    raise ConfigError(
        f"the weights in {checkpoint.folder} hold no multi-token-prediction module: there is no "
        f"{known}. Name a folder that holds this model's module with engine.drafter.module=...; "
        f"take a model that was trained with one; {_OTHERS}"
    )


def _check_module(
    checkpoint: Checkpoint, target: Decoder, family: Family, layout: Layout, index: int
) -> None:
    """Compare names and shapes of a module with those that the target asks for.

    Raises
    ------
    WorkbenchError
        Names every tensor that is missing, unexpected or of another shape.
    """
    prefix = layout.stack.format(index=index)
    expected = {p.name: p for p in parameters(target, family.names, layout, index)}
    found = {name for name in checkpoint.names if name.startswith(prefix)}
    shared = {f"{prefix}{part}.weight" for part in layout.shared}
    missing = sorted(expected.keys() - found)
    unexpected = sorted(
        name
        for name in found - expected.keys() - shared
        if not name.endswith("rotary_emb.inv_freq")
    )
    wrong = [
        f"{name} has {list(checkpoint.shape(parameter))}, expected {list(parameter.shape)}"
        for name, parameter in expected.items()
        if name in found and checkpoint.shape(parameter) != parameter.shape
    ]
    if missing or unexpected or wrong:
        raise WorkbenchError(
            f"the multi-token-prediction module {prefix.rstrip('.')} in {checkpoint.folder} "
            f"({layout.name}'s layout) does not fit a decoder layer of the target, "
            f"{target.spec.architecture}."
            + (f" Missing: {', '.join(missing)}." if missing else "")
            + (f" Unexpected: {', '.join(unexpected[:12])}." if unexpected else "")
            + (f" Wrong shapes: {'; '.join(wrong)}." if wrong else "")
        )
