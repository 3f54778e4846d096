"""A batch of requests whose sequences end with trees, and what each query must come out as."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import kernels
from kernels.tree_attention import Tree, tree_rows
from workbench.engine.trees import path_to

SCALE, BLOCK_SIZE, KV_HEADS, HEADS, HEAD_DIM = 0.3, 4, 2, 4, 16


def random_parents(rng: random.Random, count: int) -> list[int]:
    """Parents of a tree of ``count`` nodes."""
    return [rng.randint(-1, i - 1) for i in range(count)]


@dataclass(frozen=True, slots=True)
class TreeCase:
    """Arguments of attention, and by query the keys that it sees.

    Attributes
    ----------
    arguments
        ``q``, caches, block table, ``query_start_loc`` and ``seq_lens``, scale.
    trees
        Of the requests that have one.
    paths
        By query, slots of the tokens before it in the text of its path, its own last.
    """

    arguments: tuple[torch.Tensor, ...]
    max_query_len: int
    trees: list[Tree]
    paths: list[list[int]]

    def options(self, window: int | None, soft_cap: float | None) -> dict[str, object]:
        """Of :func:`kernels.paged_attend`, the tree tensor among them."""
        q = self.arguments[0]
        rows = torch.from_numpy(tree_rows(self.trees, len(q), window)).to(q.device)
        return {"sliding_window": window, "soft_cap": soft_cap, "tree": rows}

    def check(self, found: torch.Tensor, window: int | None, soft_cap: float | None) -> None:
        """Each query must come out as if the text of its path were a sequence of its own."""
        q, *caches = (x.cpu() for x in self.arguments[:3])
        keys, values = (cache.view(-1, KV_HEADS, HEAD_DIM) for cache in caches)
        for query, path in enumerate(self.paths):
            wanted = kernels.paged_attend(
                q[query : query + 1],
                keys[path].unsqueeze(0),
                values[path].unsqueeze(0),
                torch.zeros(1, 1, dtype=torch.int32),
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([len(path)], dtype=torch.int32),
                SCALE,
                sliding_window=window,
                soft_cap=soft_cap,
                implementation="reference",
            )
            torch.testing.assert_close(found[query].cpu(), wanted[0], atol=1e-5, rtol=1e-5)


def tree_case(
    shapes: Sequence[tuple[int, int]], *, known: int, seed: int, device: torch.device | str = "cpu"
) -> TreeCase:
    """A batch with a request of each shape: nodes, and so many more queries (fewer if negative:
    the first nodes are in the cache already), behind 3 to ``known`` tokens."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    trees: list[Tree] = []
    paths: list[list[int]] = []
    lengths, starts, table, num_pages = [], [0], [], 0
    for count, more in shapes:
        before = rng.randint(3, known)
        parents = random_parents(rng, count)
        num_queries, total = count + more, before + count
        if count:
            trees.append(Tree(starts[-1], num_queries, before, parents))
        pages = list(range(num_pages, num_pages + -(-total // BLOCK_SIZE)))
        rng.shuffle(pages)
        num_pages += len(pages)
        for query in range(total - num_queries, total):
            path = [*range(min(query + 1, before))]
            path += [before + node for node in path_to(parents, query - before)]
            paths.append([pages[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in path])
        lengths.append(total)
        starts.append(starts[-1] + num_queries)
        table.append(pages)
    width = max(map(len, table))
    cache_shape = (2, num_pages, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    arguments = (
        torch.randn(starts[-1], HEADS, HEAD_DIM, generator=generator),
        *torch.randn(cache_shape, generator=generator).unbind(),
        torch.tensor([pages + [0] * (width - len(pages)) for pages in table], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
    )
    longest = max(count + more for count, more in shapes)
    return TreeCase(tuple(x.to(device) for x in arguments), longest, trees, paths)
