"""Attention of tokens that form a tree: each sees what leads to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention_reference import attend_reference, causal_mask, gather_pages


def tree_mask(
    num_queries: int,
    seq_len: int,
    parents: Sequence[int],
    sliding_window: int | None,
    device: torch.device,
) -> Tensor:
    """Which keys the last ``num_queries`` tokens of a sequence see that ends with the nodes of a
    tree: bool ``[num_queries, seq_len]``.

    Parameters
    ----------
    num_queries
        Some or all of the nodes, or all of them and tokens before them.
    seq_len
        Keys, nodes included.
    parents
        By node, the node that it follows, -1 for the token before all of them.
    sliding_window
        A query sees itself and what is less than this many positions before it; a node's position
        is that of its depth.
    """
    count = len(parents)
    first, num_rows = seq_len - count, max(num_queries, count)
    seen = causal_mask(num_rows, seq_len, None, torch.device("cpu"))
    depths: list[int] = []
    for node, parent in enumerate(parents):
        row = seen[num_rows - count + node]
        row[first:] = False
        if parent >= 0:
            row[first:] = seen[num_rows - count + parent, first:]
        row[first + node] = True
        depths.append(1 if parent < 0 else depths[parent] + 1)
    if sliding_window is not None:
        positions = torch.arange(seq_len)
        positions[first:] = first - 1 + torch.tensor(depths)
        own = positions[seq_len - num_rows :].unsqueeze(1)
        seen &= positions > own - sliding_window
    return seen[num_rows - num_queries :].to(device)


def attend_tree(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: Tensor,
    mask: Tensor,
    scale: float,
    *,
    soft_cap: float | None = None,
) -> Tensor:
    """Attention of one request's queries to its cached keys, as far as a mask lets them see.

    Parameters
    ----------
    q : Tensor [Q, Hq, D]
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        In the dtype of ``q``; they hold this step's keys and values.
    blocks : Tensor [P] int32
        The request's blocks in order.
    mask : Tensor [Q, S] bool
        Of :func:`tree_mask`.

    Returns
    -------
    Tensor [Q, Hq, D]
    """
    keys, values = (gather_pages(cache, blocks, 0, mask.shape[1]) for cache in (k_cache, v_cache))
    if soft_cap is not None:
        return attend_reference(q, keys, values, scale, mask, soft_cap=soft_cap)[0]
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)
