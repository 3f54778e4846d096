"""EAGLE heads: one decoder layer that goes on from the target's hidden states.

EAGLE (Li et al. 2024, arXiv:2401.15077) reads the last hidden state after the final norm and ends
in the target's output layer; EAGLE-3 (arXiv:2503.01840) joins hidden states of three layers and has
an output layer of its own over a reduced vocabulary. Parameter names are those of SafeAILab/EAGLE.

Position ``j`` of the inputs joins the hidden state behind token ``j`` with the embedding of token
``j + 1``, which is known by then, and guesses token ``j + 2``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from techniques.draft_heads.spec import HeadSpec
from workbench.models.spec import ModelSpec


class RMSNorm(nn.Module):
    """Computed in float32, whatever the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class UnrolledKeys:
    """Keys and values of an unrolled head: those of the first step, and one a later step.

    In step ``s`` base ``j`` sees the first step's places up to ``j`` and its own of steps ``1..s``,
    as a chain of drafts does that starts behind token ``j``.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Add ``k`` and ``v`` and attend with ``q``, all ``[B, Hq, S, D]``."""
        self.steps.append((k, v))
        first_k, first_v = self.steps[0]
        if len(self.steps) == 1:
            return F.scaled_dot_product_attention(q, first_k, first_v, is_causal=True, scale=scale)
        size = q.shape[2]
        hidden = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ first_k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
        own = torch.stack([(q * k).sum(-1) for k, _ in self.steps[1:]], dim=-1)
        weights = (torch.cat([scores, own], dim=-1).float() * scale).softmax(-1).to(q.dtype)
        out = weights[..., :size] @ first_v
        for index, (_, value) in enumerate(self.steps[1:]):
            out = out + weights[..., size + index].unsqueeze(-1) * value
        return out


class Attention(nn.Module):
    """Causal attention with rotary embeddings; its inputs may be wider than its output."""

    def __init__(self, spec: ModelSpec, in_features: int) -> None:
        super().__init__()
        layer = spec.layers[0]
        self.shape, self.rope = layer.attention, layer.rope
        bias = spec.qkv_bias
        self.q_proj = nn.Linear(in_features, layer.q_size, bias=bias)
        self.k_proj = nn.Linear(in_features, layer.kv_size, bias=bias)
        self.v_proj = nn.Linear(in_features, layer.kv_size, bias=bias)
        self.o_proj = nn.Linear(layer.q_size, spec.hidden_size, bias=spec.o_bias)
        self._table: torch.Tensor | None = None  # kept, as it comes from the host

    def forward(self, x: torch.Tensor, first_position: int, keys: UnrolledKeys) -> torch.Tensor:
        """``[B, S, in]`` at positions from ``first_position`` on to ``[B, S, H]``."""
        shape, (batch, size, _) = self.shape, x.shape

        def heads(y: torch.Tensor, count: int) -> torch.Tensor:
            return y.view(batch, size, count, shape.head_dim).transpose(1, 2)

        table = self._angles(first_position + size, x.device)[first_position:]
        q = rotate(heads(self.q_proj(x), shape.num_heads), table)
        k = rotate(heads(self.k_proj(x), shape.num_kv_heads), table)
        v = heads(self.v_proj(x), shape.num_kv_heads)
        groups = shape.num_heads // shape.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = keys.attend(q, k, v, shape.scale)
        y: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, size, -1))
        return y

    def _angles(self, size: int, device: torch.device) -> torch.Tensor:
        """Cosines and sines of the first ``size`` positions."""
        table = self._table
        if table is None or len(table) < size or table.device != device:
            table = self._table = self.rope.table(max(size, 512), device)
        return table[:size]


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate ``x[B, N, S, D]`` by ``table[S, R]``, cosines then sines; the rest of D stays."""
    width = table.shape[1]
    cos, sin = table.to(x.dtype).chunk(2, dim=-1)
    first, second = x[..., :width].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, x[..., width:])
    return torch.cat(turned, dim=-1)


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        hidden, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        y: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class EagleLayer(nn.Module):
    """The decoder layer: EAGLE-3's attention reads embeddings and hidden states side by side, each
    behind a norm; EAGLE's reads what ``fc`` joined, without a norm."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        layer, self.is_third = spec.layer, spec.kind == "eagle3"
        hidden, eps = layer.hidden_size, layer.norm_eps
        self.self_attn = Attention(layer, 2 * hidden if self.is_third else hidden)
        self.mlp = GatedMlp(layer)
        if self.is_third:
            self.input_layernorm = RMSNorm(hidden, eps)
            self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(
        self, embeds: torch.Tensor, hidden: torch.Tensor, position: int, keys: UnrolledKeys
    ) -> torch.Tensor:
        """``[B, S, H]`` each to ``[B, S, H]``; EAGLE's ``embeds`` are in ``hidden`` already."""
        x = hidden
        if self.is_third:
            x = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(x, position, keys)
        mlp: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + mlp


class EagleModule(nn.Module):
    """An EAGLE or EAGLE-3 head over whole texts, with dense causal attention: for training.

    Parameters
    ----------
    embedding : Tensor [V, H]
        The target's, with the factor that it puts on embeddings.
    lm_head : Tensor [V, H]
        The target's output layer: EAGLE's own, and what EAGLE-3's starts from.
    d2t : Tensor [draft_vocab] int64, optional
        Id of each draft id less the draft id, where the vocabulary is reduced.
    """

    def __init__(
        self,
        spec: HeadSpec,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
        d2t: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.is_third = spec, spec.kind == "eagle3"
        hidden = spec.hidden_size
        #: The target's own, in lists so that they are no parameters of the head.
        self._embedding, self._lm_head = [embedding], [lm_head]
        joined = 3 * hidden if self.is_third else 2 * hidden
        self.fc = nn.Linear(joined, hidden, bias=spec.fc_bias)
        if self.is_third:
            self.midlayer = EagleLayer(spec)
            self.norm = RMSNorm(hidden, spec.layer.norm_eps)
            self.lm_head = nn.Linear(hidden, spec.draft_vocab_size, bias=False)
            ids = target_ids(spec, d2t, lm_head.device)
            self.register_buffer("d2t", ids - torch.arange(len(ids), device=ids.device))
            in_draft = torch.zeros(spec.vocab_size, dtype=torch.bool, device=ids.device)
            self.register_buffer("t2d", in_draft.index_fill(0, ids, True))
        else:
            self.layers = nn.ModuleList([EagleLayer(spec)])
        self._draw(lm_head)

    def _draw(self, lm_head: torch.Tensor) -> None:
        """Start as decoders do: small normal matrices; the output layer from the target's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.spec.layer.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.is_third:
            with torch.no_grad():
                self.lm_head.weight.copy_(lm_head[self.draft_ids])

    @property
    def draft_ids(self) -> torch.Tensor:
        """Target id of each draft id, ``[draft_vocab]``."""
        return target_ids(self.spec, getattr(self, "d2t", None), self._lm_head[0].device)

    def forward(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, num_steps: int = 1
    ) -> list[torch.Tensor]:
        """Features of each step of a chain that starts at every position.

        The first step reads the target's hidden states, each later one the features of the step
        before and the text's next token: what a chain whose drafts were all right would do
        (EAGLE-3's training-time test).

        Parameters
        ----------
        hidden : Tensor[B, S, H] or [B, S, 3 H]
            Of the target, behind tokens ``0..S-1``.
        token_ids : Tensor[B, S + num_steps] int64
            Of the text, from its first token on.

        Returns
        -------
        list of Tensor[B, S, H]
            Step ``s`` at base ``j`` guesses token ``j + 2 + s``.
        """
        size = hidden.shape[1]
        features, keys, found = self.fc(hidden) if self.is_third else hidden, UnrolledKeys(), []
        for step in range(num_steps):
            ids = token_ids[:, 1 + step : 1 + step + size]
            embeds = F.embedding(ids, self._embedding[0]).to(features.dtype)
            if self.is_third:
                features = self.midlayer(embeds, features, step, keys)
            else:
                joined = self.fc(torch.cat([embeds, features], dim=-1))
                features = self.layers[0](embeds, joined, step, keys)
            found.append(features)
        return found

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """``[..., draft_vocab]`` from features ``[..., H]``."""
        if not self.is_third:
            return F.linear(features, self._lm_head[0].to(features.dtype))
        logits: torch.Tensor = self.lm_head(self.norm(features))
        return logits


def target_ids(spec: HeadSpec, d2t: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Target id of each draft id, ``[draft_vocab]`` int64."""
    ids = torch.arange(spec.draft_vocab_size, device=device)
    return ids if d2t is None else ids + d2t.to(device)
