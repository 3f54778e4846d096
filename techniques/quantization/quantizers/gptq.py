"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, and those
still to come are corrected for the error made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from techniques.quantization.quantizers.base import (
    InputStatistics,
    Needs,
    Quantizer,
    search_grid,
    shrink_steps,
)
from techniques.quantization.weights import QuantizedWeight, WeightScheme, group_of_inputs
from workbench.core.errors import ConfigError, WorkbenchError


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """Options of :class:`GPTQ`.

    Attributes
    ----------
    damp
        Share of the mean diagonal of the Hessian that is added to its diagonal.
    block_size
        Columns after which the corrections of all further columns are made at once. A matter of
        speed alone.
    act_order
        Columns in the order of their inputs' size, largest first. Groups are then of columns in
        this order, unless the grids are static.
    static_groups
        Whether grids are found from the weights as they were, not when their columns' turn comes.
        With ``act_order`` groups stay consecutive inputs, which kernels read faster.
    clip_steps, clip_least
        As of round to nearest.
    """

    damp: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False
    clip_steps: int = 1
    clip_least: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not self.damp >= 0:
            raise ConfigError(f"damp={self.damp} must be 0 or more; 0.01 is usual.")
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size} must be 1 or more; 128 is usual.")


class GPTQ(Quantizer):
    """Least squared error of the layer's output, column by column.

    Rounding column ``j`` makes an error ``e``. With ``U^T U`` the inverse of the Hessian, ``U``
    upper triangular, the best that the columns behind can do is to move by ``-e U[j, k] / U[j, j]``
    each. Outputs do not depend on each other, so that all of them are done at once.

    Inputs that are always 0 on the calibration text say nothing of their weights, which are rounded
    to nearest (the authors' code sets them to 0).
    """

    Options = GPTQOptions
    needs = Needs(hessian=True)

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        options: GPTQOptions = self.options
        if inputs is None:
            raise ConfigError(f"{name}: GPTQ needs calibration texts.")
        in_features = weight.shape[1]
        num_groups = scheme.num_groups(in_features)
        hessian = inputs.hessian.to(weight.device)
        order = torch.arange(in_features, device=weight.device)
        if options.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        shrinks = shrink_steps(options.clip_steps, options.clip_least)
        consecutive = group_of_inputs(in_features, num_groups, None).to(weight.device)
        grids = _Grids(weight[:, order], scheme, num_groups, shrinks)
        if options.static_groups:
            grids.fix(weight, group_of_columns=consecutive[order])
        codes = _round_columns(
            weight[:, order], _inverse_factor(hessian, options.damp, name), grids, options
        )
        inverse = order.argsort()
        group_index = None
        if options.act_order and not options.static_groups and num_groups > 1:
            group_index = consecutive[inverse].to(torch.int32)
        return QuantizedWeight(
            scheme, codes[:, inverse].contiguous(), grids.scales, grids.zeros, group_index
        )


class _Grids:
    """The grids of all groups, found when the first of their columns comes, or all at first.

    ``weight`` is ``[N, K]`` in the order in which columns are rounded.
    """

    def __init__(
        self, weight: Tensor, scheme: WeightScheme, num_groups: int, shrinks: list[float]
    ) -> None:
        outputs, in_features = weight.shape
        self.scheme, self.shrinks = scheme, shrinks
        self.size = in_features // num_groups
        self.group_of_columns = [column // self.size for column in range(in_features)]
        self.scales = weight.new_zeros(outputs, num_groups)
        self.zeros: Tensor | None = None
        if scheme.has_zeros:
            self.zeros = torch.zeros_like(self.scales, dtype=torch.int16)
        self.are_fixed = False

    def fix(self, weight: Tensor, group_of_columns: Tensor) -> None:
        """Find all grids from ``weight[N, K]`` in its own order."""
        self.scales, self.zeros = search_grid(weight, self.scheme, self.shrinks)
        self.group_of_columns = group_of_columns.tolist()
        self.are_fixed = True

    def begins_at(self, column: int) -> bool:
        """Whether the grid of a group has to be found now."""
        return not self.are_fixed and column % self.size == 0

    def find(self, column: int, weight: Tensor) -> None:
        """Find the grid of the group that begins at ``column`` from its ``weight[N, size]``."""
        one_group = WeightScheme(self.scheme.bits, 0, self.scheme.has_zeros)
        scales, zeros = search_grid(weight, one_group, self.shrinks)
        group = column // self.size
        self.scales[:, group] = scales[:, 0]
        if self.zeros is not None and zeros is not None:
            self.zeros[:, group] = zeros[:, 0]

    def round(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of a column ``[N]``, in float, and the values that they stand for."""
        group = self.group_of_columns[column]
        scale = self.scales[:, group]
        least, greatest = self.scheme.least, self.scheme.greatest
        if self.zeros is None:
            codes = (weight / scale).round_().clamp_(least, greatest)
            return codes, codes * scale
        zero = self.zeros[:, group].float()
        codes = (weight / scale).add_(zero).round_().clamp_(least, greatest)
        return codes, (codes - zero).mul_(scale)


def _inverse_factor(hessian: Tensor, damp: float, name: str) -> Tensor:
    """``U[K, K]`` float32, upper triangular, ``U^T U`` the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0
    diagonal += damp * mean
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        raise WorkbenchError(
            f"{name}: the Hessian of its inputs cannot be inverted with damp={damp}. Use a larger "
            "damp, such as 0.1, or more calibration text."
        )
    upper: Tensor = factor.float()
    return upper


def _round_columns(weight: Tensor, upper: Tensor, grids: _Grids, options: GPTQOptions) -> Tensor:
    """Codes ``[N, K]`` int16 of ``weight[N, K]``, from the first column to the last."""
    # Columns lie in rows, so that each is one stretch of memory.
    w = weight.float().T.contiguous()
    in_features = len(w)
    codes = torch.empty_like(w, dtype=torch.int16)
    steps = upper.diagonal().tolist()
    for start in range(0, in_features, options.block_size):
        end = min(start + options.block_size, in_features)
        block, corner = w[start:end], upper[start:end, start:end]
        errors = torch.zeros_like(block)
        for i in range(end - start):
            column = start + i
            if grids.begins_at(column):
                group_end = column + grids.size
                ahead = w[column:group_end]
                if group_end > end:  # what lies behind the block does not have its corrections yet
                    pending = upper[start:column, end:group_end].T @ errors[:i]
                    ahead = torch.cat([w[column:end], w[end:group_end] - pending])
                grids.find(column, ahead.T)
            found, values = grids.round(column, block[i])
            codes[column] = found
            errors[i] = (block[i] - values) / steps[column]
            block[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T
