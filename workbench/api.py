"""The engine from Python."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from workbench import assemble
from workbench.assemble import EngineConfig, Limits
from workbench.configuration import Composed, compose_config, engine_config, parse_markers
from workbench.engine.engine import Engine


def build_engine(
    cfg: DictConfig | EngineConfig | None = None,
    *,
    model: str | None = None,
    technique: str | Sequence[str] = (),
    overrides: Sequence[str] = (),
    max_num_seqs: int = 32,
    max_model_len: int = 0,
    kv_pool_tokens: int | str = 0,
    memory_fraction: float = Limits().memory_fraction,
    download: bool = True,
) -> Engine:
    """Assemble an engine.

    Parameters
    ----------
    cfg
        A configuration composed by Hydra from ``conf/``, or an ``EngineConfig``. None composes
        one from the other arguments.
    model
        A catalogue name, a folder, a ``.gguf`` file or a Hub id; default SmolLM2-135M-Instruct.
    technique
        One technique or several, as after ``+technique=``; what they require must be among them.
    overrides
        Further Hydra overrides, such as ``"engine.kv_cache.block_size=32"``.
    max_num_seqs, max_model_len, kv_pool_tokens, memory_fraction
        Sizes (see :class:`workbench.assemble.Limits`); 0 takes the model's context, and a KV pool
        for all requests within a share of the memory.
    download
        Whether a model that is not in the store may be fetched.

    Raises
    ------
    WorkbenchError
        What was wrong, what is valid, and what to do.

    Examples
    --------
    >>> engine = build_engine(max_model_len=1024)  # doctest: +SKIP
    >>> engine.generate("The capital of France is")[0].text  # doctest: +SKIP
    """
    if isinstance(cfg, EngineConfig):
        return assemble.build_engine(cfg)
    limits = Limits(max_num_seqs, max_model_len, kv_pool_tokens, memory_fraction)
    if cfg is not None:
        nodes = OmegaConf.to_container(cfg.techniques, resolve=True)
        composed = Composed(cfg, {}, parse_markers(nodes))
    else:
        names = [technique] if isinstance(technique, str) else list(technique)
        composed = compose_config(
            [
                *([f"model={model}"] if model is not None else []),
                *([f"+technique=[{','.join(names)}]"] if names else []),
                *overrides,
            ]
        )
    return assemble.build_engine(engine_config(composed, limits, download=download))
