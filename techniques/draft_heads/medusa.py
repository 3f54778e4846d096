"""Medusa heads (Cai et al. 2024, arXiv:2401.10774): each guesses a token further ahead.

Parameter names are those of FasterDecoding/Medusa: ``{head}.{layer}.linear.weight`` and ``.bias``
of the residual blocks, ``{head}.{num_layers}.weight`` of the output layer.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from techniques.draft_heads.spec import HeadSpec


class ResidualBlock(nn.Module):
    """``x + silu(linear(x))``; with the zeros that it starts from, the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return x + F.silu(self.linear(x))


class MedusaHead(nn.Module):
    """All heads of a target. They read its last hidden state after the final norm.

    With the state behind token ``t`` the target itself draws token ``t + 1``, and head ``k``,
    counted from 0, guesses token ``t + 2 + k``.

    Parameters
    ----------
    lm_head : Tensor [V, H] or None
        The target's output layer: what own output layers start from, and what shared ones are.
        None leaves own ones for weights to be loaded.
    d2t : Tensor [draft_vocab] int64, optional
        Id of each draft id less the draft id, where the vocabulary is reduced.
    """

    d2t: torch.Tensor | None

    def __init__(
        self, spec: HeadSpec, lm_head: torch.Tensor | None = None, d2t: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("d2t", d2t)
        ids = None if d2t is None else d2t + torch.arange(len(d2t), device=d2t.device)
        rows = lm_head if lm_head is None or ids is None else lm_head[ids]
        #: Output layer that all heads share; not a parameter of theirs.
        self._shared = [rows] if spec.shares_lm_head else []
        for index in range(spec.num_heads):
            blocks: list[nn.Module] = [
                ResidualBlock(spec.hidden_size) for _ in range(spec.num_layers)
            ]
            if not spec.shares_lm_head:
                output = nn.Linear(spec.hidden_size, spec.draft_vocab_size, bias=False)
                if rows is not None:
                    with torch.no_grad():
                        output.weight.copy_(rows)
                blocks.append(output)
            self.add_module(str(index), nn.Sequential(*blocks))

    def logits(self, head: int, hidden: torch.Tensor) -> torch.Tensor:
        """Of one head, ``[..., draft_vocab]``, from ``hidden[..., H]`` after the final norm."""
        x: torch.Tensor = self.get_submodule(str(head))(hidden)
        if not self._shared:
            return x
        shared = self._shared[0]
        assert shared is not None, "shared heads need the target's output layer"
        return F.linear(x, shared.to(x.dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all heads, ``[K, ..., draft_vocab]``, from ``hidden[..., H]``."""
        return torch.stack([self.logits(k, hidden) for k in range(self.spec.num_heads)])

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Ids of the target for ids of the draft vocabulary, of any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def top(
        self, hidden: torch.Tensor, count: int, num_heads: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest ids of the first heads, best first, int64 ``[..., K, count]`` from
        ``hidden[..., H]``, and their log-probabilities, float32."""
        ids, logprobs = [], []
        for k in range(self.spec.num_heads if num_heads is None else num_heads):
            logits = self.logits(k, hidden).float()
            best, found = logits.topk(count, dim=-1)
            ids.append(found)
            logprobs.append(best - logits.logsumexp(-1, keepdim=True))
        return self.to_target_ids(torch.stack(ids, dim=-2)), torch.stack(logprobs, dim=-2)
