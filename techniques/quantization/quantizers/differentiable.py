"""A decoder layer in operations that gradients pass, as a function of its linear layers' weights.

Kernels work in place and know no gradients; products, norms, rotation and attention are plain torch
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.norm import rms_norm_reference
from kernels.rotary import rotate_reference
from techniques.quantization.quantizers.calibration import CalibrationRun, shards_of
from workbench.models.decoder import DecoderLayer, SandwichLayer
from workbench.slots.linear import LinearLayer


class DecoderLayerProblem:
    """What a decoder layer makes of the calibration texts, and what it should.

    Parameters
    ----------
    run
        In front of the layer; it keeps the original streams, which are behind it already.
    names
        Checkpoint layers to be quantised.
    seed
        Of draws of texts.

    Attributes
    ----------
    weights : dict[str, Tensor [N, K] float32]
        Of the layers to be quantised, as they are.
    """

    def __init__(
        self, run: CalibrationRun, layer: DecoderLayer, names: Sequence[str], seed: int
    ) -> None:
        self.layer, self.seed = layer, seed
        self.weights = {
            shard.name: shard.weight.float()
            for linear in layer.linears
            for shard in shards_of(linear)
            if shard.name in names
        }
        self._inputs = run.by_text(run.streams)
        self._wanted = run.by_text(run.originals)

    @property
    def num_texts(self) -> int:
        """How many there are."""
        return len(self._inputs)

    def wanted(self, text: int) -> Tensor:
        """Output of the original model behind this layer, ``[T, H]``."""
        return self._wanted[text]

    def outputs(self, weights: Mapping[str, Tensor], texts: list[int]) -> list[Tensor]:
        """Output of the layer with ``weights`` in place of its own, ``[T, H]`` each."""
        inputs = [self._inputs[text] for text in texts]
        # What stands behind a text's end is seen by padding alone.
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        out = run_layer(self.layer, padded, weights)
        return [row[: len(x)] for row, x in zip(out, inputs, strict=True)]


def run_layer(layer: DecoderLayer, stream: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """A decoder layer on texts ``[B, T, H]`` that begin at position 0, residuals included."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, layer.eps, offset=layer.offset)

    def linear(of: LinearLayer, x: Tensor) -> Tensor:
        parts = [weights.get(shard.name, shard.weight) for shard in shards_of(of)]
        return F.linear(x, parts[0] if len(parts) == 1 else torch.cat(parts), of.state.bias)

    x = linear(layer.qkv_proj, norm(stream, layer.attention_norm))
    x = linear(layer.o_proj, _attention(layer, x))
    stream = stream + (norm(x, layer.attention_out_norm) if isinstance(layer, SandwichLayer) else x)
    gate, up = linear(layer.gate_up_proj, norm(stream, layer.mlp_norm)).chunk(2, -1)
    if layer.activation_name == "silu":
        gate = F.silu(gate)
    else:
        gate = F.gelu(gate, approximate="tanh")
    x = linear(layer.down_proj, gate * up)
    return stream + (norm(x, layer.mlp_out_norm) if isinstance(layer, SandwichLayer) else x)


def _attention(layer: DecoderLayer, qkv: Tensor) -> Tensor:
    """``[B, T, (Hq + 2 Hkv) D]`` to ``[B, T, Hq D]``."""
    about, rope = layer.attention, layer.rope
    count, length, _ = qkv.shape
    heads = qkv.view(count * length, -1, about.head_dim)
    q, k, v = torch.split(heads, [about.num_heads, about.num_kv_heads, about.num_kv_heads], 1)
    positions = torch.arange(length, device=qkv.device).repeat(count)
    turned = []
    for x, weight in ((q, rope.q_norm), (k, rope.k_norm)):
        if weight is not None:
            x = rms_norm_reference(x, weight, rope.eps, offset=rope.norm_offset)
        turned.append(rotate_reference(x, positions, rope.cos_sin))
    shared = about.num_heads // about.num_kv_heads
    q, k, v = (x.view(count, length, -1, about.head_dim).transpose(1, 2) for x in (*turned, v))
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    distance = positions[:length, None] - positions[None, :length]
    seen = distance >= 0
    if about.sliding_window is not None:
        seen = seen & (distance < about.sliding_window)
    if about.soft_cap is None:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=about.scale)
    else:
        scores = about.soft_cap * torch.tanh(q @ k.transpose(2, 3) * about.scale / about.soft_cap)
        x = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    joined: Tensor = x.transpose(1, 2).reshape(count, length, -1)
    return joined
