"""Slot ``linear``: how weights of linear layers are stored and multiplied."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import kernels
from workbench.core.errors import UnsupportedError
from workbench.slots.component import Component


@dataclass(slots=True)
class LinearLayer:
    """One linear layer, ``y = x W^T + b``.

    Attributes
    ----------
    name
        Name within the model, such as ``layers.3.qkv_proj``; schemes select layers by it.
    shards
        Names and widths of the checkpoint's layers that are stacked along the output.
    params
        What the loader fills, by the checkpoint's suffix (``weight``, ``bias``, …). Tensors of the
        stacked layers lie behind one another along their outputs; what has no outputs lies in a
        parameter with one dimension more, the first, which counts the shards.
    state
        What ``apply`` uses, made by ``process_weights_after_loading``.
    optional
        Of ``params``, what the checkpoint may lack: then it stays as it was created.
    """

    name: str
    in_features: int
    out_features: int
    shards: tuple[tuple[str, int], ...]
    has_bias: bool = False
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    state: Any = None
    optional: set[str] = field(default_factory=set)


class LinearMethod(Component):
    """One scheme for linear layers. The model calls ``apply`` and knows nothing else."""

    #: Bound on the relative error of the layer's output that the scheme declares; 0 is exact.
    error_bound: float = 0.0
    #: Of a checkpoint's layer, tensors that the method can do without.
    unread_suffixes: tuple[str, ...] = ()

    def read_checkpoint(self, quantization: Mapping[str, Any] | None) -> None:
        """Learn how the checkpoint's weights are quantised, from its ``quantization_config``; None:
        they are not, or random ones are drawn. Called before any layer is created.

        Raises
        ------
        UnsupportedError
            The method cannot read them.
        """
        if quantization is not None:
            raise UnsupportedError(
                f"the checkpoint is quantised ({quantization.get('quant_method')!r} in its "
                f"config.json), and engine/linear holds {type(self).__name__}, which reads weights "
                "as they were trained. Choose engine/linear=packed_checkpoint where weights alone "
                "are quantised, scaled_checkpoint where activations are too, or a checkpoint that "
                "is not quantised."
            )

    @abstractmethod
    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        """Fill ``layer.params`` with empty tensors of the shapes that the checkpoint has."""

    @abstractmethod
    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        """Turn ``params`` into ``state``; ``params`` that are no longer needed are dropped.

        Parameters
        ----------
        expected_tokens
            Rows of a typical input, a hint for packing.
        """

    def finish_loading(self) -> None:
        """All layers of the model are there: raise :class:`ConfigError` where options fit none."""

    @abstractmethod
    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        """``x[T, in_features]`` to ``[T, out_features]``; ``x`` may also be what
        :meth:`prepare_normed` or :meth:`prepare_gated` gave for this layer."""

    # -- products with their neighbours -----------------------------------------------------------

    def prepares(self, layer: LinearLayer) -> bool:
        """Whether it has launches that norm or gate the inputs of ``layer`` and put them into a
        form of its own; only then are the two methods below called, by ops that would take one
        launch themselves."""
        return False

    def prepare_normed(
        self,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: kernels.RowNorm,
        residual: torch.Tensor | None = None,
    ) -> Any:
        """Inputs of ``layer`` for :meth:`apply`: the norm of ``x[T, in_features]``, or of its sum
        with ``residual``, which is kept there."""
        raise NotImplementedError

    def prepare_gated(self, layer: LinearLayer, gate_up: torch.Tensor, activation: str) -> Any:
        """Inputs of ``layer`` for :meth:`apply`: the activation (``silu``, ``gelu_tanh``) of the
        first half of ``gate_up[T, 2 * in_features]`` times the second half."""
        raise NotImplementedError

    def gates(self, num_tokens: int) -> bool:
        """Whether a product of so many rows multiplies its own halves; only then is
        :meth:`apply_gated` called."""
        return False

    def apply_gated(self, layer: LinearLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
        """``apply`` of ``x[T, in_features]``, of which the activation (``silu``, ``gelu_tanh``) of
        the first half times the second half: ``[T, out_features / 2]``."""
        raise NotImplementedError

    def fuses(self, num_tokens: int) -> bool:
        """Whether the products of a step of so many tokens take the norm in front of them and what
        follows them into their own launches; only then are the two methods below called."""
        return False

    def apply_normed(
        self,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: kernels.RowNorm,
        activation: str | None = None,
    ) -> torch.Tensor:
        """``apply`` of the norm of ``x[T, in_features]``; with an activation (``silu``,
        ``gelu_tanh``), that of the first half of the output times the second half."""
        raise NotImplementedError

    def apply_add_(self, layer: LinearLayer, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Add what ``apply`` gives to ``residual[T, out_features]`` in place."""
        raise NotImplementedError

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why it cannot serve a model of ``dtype`` on ``device``; empty when it can."""
        return []


class DenseLinear(LinearMethod):
    """Weights in the model's dtype: the null object.

    On the CPU they are packed once into the layout that the matrix library computes in.
    """

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layer.out_features, layer.in_features)
        layer.params["weight"] = torch.empty(shape, dtype=dtype, device=device)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(layer.out_features, dtype=dtype, device=device)

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight = layer.params.pop("weight")
        layer.state = kernels.pack_linear(weight, layer.params.pop("bias", None), expected_tokens)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        return kernels.apply_linear(layer.state, x)
