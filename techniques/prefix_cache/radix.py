"""Prefixes as a compressed tree over token ids, whose edges hold runs of whole blocks.

The idea is SGLang's RadixAttention (Zheng et al. 2024, arXiv:2312.07104, section 3). What matches
costs by the run, not by the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from techniques.prefix_cache.order import EvictionOrder, order_of
from techniques.prefix_cache.shared import (
    TOKEN_BYTES,
    Lookup,
    SharingCache,
    SharingConfig,
    token_bytes,
)
from workbench.core.request import Request
from workbench.slots.eviction import Eviction
from workbench.slots.prefix_cache import PrefixMatch, Published

#: A child is found by its first block's tokens, under the root by ``Request.extra_keys`` as well.
_ChildKey = bytes | tuple[tuple[str, ...], bytes]


class _Node:
    """A run of blocks that are locked, and until a split used, together.

    Attributes
    ----------
    tokens, blocks
        Bytes of the run's token ids, and its blocks.
    start
        Blocks that lead to the run.
    parent, key
        The node it hangs under (the root under itself), and under which key.
    locks
        Requests whose prefix ends with this run, and children that are locked; a mark of the order,
        0 or less, where there are none. The root has one of its own, so that walks end there.
    """

    __slots__ = ("blocks", "children", "key", "locks", "parent", "start", "tokens")

    def __init__(
        self,
        tokens: bytearray,
        blocks: list[int],
        start: int,
        parent: _Node | None,
        key: _ChildKey,
        locks: int,
    ) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.start = start
        self.parent = parent or self
        self.key = key
        self.locks = locks
        self.children: dict[_ChildKey, _Node] = {}


class RadixCache(SharingCache):
    """Finds a prefix run by run.

    Nodes are split where a used prefix ends and where two prefixes part, and never joined again.
    Of a split the lower part stays the same object, so that handles on the whole run still lead to
    its end, and walking up from it to any earlier one. ``Request.prefix_key`` is a ``bytearray``
    of all tokens that were needed so far.
    """

    def __init__(
        self, config: SharingConfig | None = None, *, block_size: int, eviction: Eviction
    ) -> None:
        super().__init__(config, block_size=block_size, eviction=eviction)
        self._block_bytes = block_size * TOKEN_BYTES
        self._root = _Node(bytearray(), [], 0, None, b"", 1)
        self._order: EvictionOrder[_Node] = order_of(eviction, attrgetter("locks"))

    # -- looking up ---------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        self._key(request, request.num_tokens // self.block_size)

    def _key(self, request: Request, num_blocks: int) -> bytearray:
        """Bytes of the request's tokens, at least those of the first ``num_blocks`` blocks."""
        if request.prefix_key is None:  # asked for before it arrived
            request.prefix_key = bytearray()
        data: bytearray = request.prefix_key
        if len(data) < num_blocks * self._block_bytes:
            known = len(data) // TOKEN_BYTES
            data += token_bytes(request, known, num_blocks * self.block_size)
        return data

    def match(self, request: Request) -> Lookup:
        limit = (request.num_tokens - 1) // self.block_size
        nodes, num_blocks = self._descend(request, self._root, 0, limit)
        if not nodes:
            return Lookup(num_queried=request.num_tokens, priority=request.priority)
        return Lookup(
            block_ids=tuple(self._blocks(nodes, num_blocks)),
            num_tokens=num_blocks * self.block_size,
            entry=nodes[-1],
            num_queried=request.num_tokens,
            priority=request.priority,
        )

    def match_length(self, request: Request) -> int:
        limit = (request.num_tokens - 1) // self.block_size
        return self._descend(request, self._root, 0, limit)[1] * self.block_size

    @staticmethod
    def _blocks(nodes: list[_Node], num_blocks: int) -> list[int]:
        """The first blocks of successive nodes."""
        blocks: list[int] = []
        for node in nodes:
            blocks += node.blocks
        del blocks[num_blocks:]
        return blocks

    def _descend(
        self, request: Request, node: _Node, start: int, stop: int
    ) -> tuple[list[_Node], int]:
        """Follow a request's blocks ``start .. stop - 1`` down from ``node``.

        Returns the nodes that have some of them, and where the cached blocks end: inside or at the
        end of the last node.
        """
        data = self._key(request, stop)
        size = self._block_bytes
        nodes: list[_Node] = []
        while start < stop:
            at = start * size
            first = bytes(data[at : at + size])
            child = node.children.get((request.extra_keys, first) if node is self._root else first)
            if child is None:
                break
            nodes.append(child)
            length = len(child.blocks)
            if length > stop - start or not data.startswith(child.tokens, at):
                start += self._common(child.tokens, data, at, min(length, stop - start))
                break
            start += length
            node = child
        return nodes, start

    def _common(self, tokens: bytearray, data: bytearray, at: int, limit: int) -> int:
        """Blocks, of at most ``limit``, in which a run and a request agree; the first one does."""
        size = self._block_bytes
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if data.startswith(tokens[low * size : middle * size], at + low * size):
                low = middle
            else:
                high = middle - 1
        return low

    # -- locks --------------------------------------------------------------------------------

    def _node_of(self, match: PrefixMatch) -> _Node:
        """The node in which a match ends, however often the run was split since."""
        node: _Node = match.entry
        num_blocks = len(match.block_ids)
        while node.start >= num_blocks:
            node = node.parent
        return node

    def _lock(self, match: PrefixMatch) -> None:
        node, num_blocks = self._node_of(match), len(match.block_ids)
        last = node.blocks[num_blocks - node.start - 1 : num_blocks - node.start]
        assert last == [match.block_ids[-1]], "a match from before an eviction"
        self._acquire(self._end_at(node, num_blocks))

    def _unlock(self, match: PrefixMatch) -> None:
        node = self._node_of(match)
        assert node.start + len(node.blocks) == len(match.block_ids), "a lock inside a run"
        self._release(node)

    def _acquire(self, node: _Node) -> None:
        while node.locks <= 0:
            node.locks = 1
            self._order.lock((node,))
            self.num_evictable -= len(node.blocks)
            node = node.parent
        node.locks += 1

    def _release(self, node: _Node) -> None:
        while node.locks == 1:
            node.locks = self._order.mark
            self._order.release((node,))
            self.num_evictable += len(node.blocks)
            node = node.parent
        node.locks -= 1

    def _end_at(self, node: _Node, num_blocks: int) -> _Node:
        """The node that ends after so many blocks from the root: this one, or its upper part."""
        length = num_blocks - node.start
        if length == len(node.blocks):
            return node
        cut = length * self._block_bytes
        parent, tokens, blocks = node.parent, node.tokens[:cut], node.blocks[:length]
        upper = _Node(tokens, blocks, node.start, parent, node.key, 1)
        parent.children[upper.key] = upper
        del node.tokens[:cut], node.blocks[:length]
        node.start = num_blocks
        node.parent = upper
        node.key = bytes(node.tokens[: self._block_bytes])
        upper.children[node.key] = node
        self._order.split(upper, node)
        if node.locks <= 0:
            upper.locks = self._order.mark
            self._order.release((upper,))
        self._num_splits += 1
        return upper

    def _note_hits(self, match: Lookup, num_hits: int) -> None:
        self._order.use(self._path(self._node_of(match)), match.priority, num_hits)

    def _path(self, node: _Node) -> Iterator[_Node]:
        """A node and those it hangs under, without the root."""
        while node is not self._root:
            yield node
            node = node.parent

    # -- publishing and evicting --------------------------------------------------------------

    def insert(
        self, request: Request, block_ids: list[int], num_tokens: int, held: PrefixMatch
    ) -> Published:
        num_blocks = num_tokens // self.block_size
        num_held = len(held.block_ids)
        if num_blocks <= num_held:
            return Published(held, [])
        node = self._node_of(held) if num_held else self._root
        nodes, num_found = self._descend(request, node, num_held, num_blocks)
        taken: list[int] = []
        if nodes:
            node = self._end_at(nodes[-1], num_found)
            taken = self._join(request, node, block_ids, num_held)
        if num_found < num_blocks:
            added = block_ids[num_found:num_blocks]
            node = self._add(request, node, num_found, added, extend=bool(num_held and not nodes))
            taken += added
        blocks: list[int] = []
        for step in reversed([*self._path(node)]):
            blocks += step.blocks
        return Published(PrefixMatch(tuple(blocks), num_blocks * self.block_size, node), taken)

    def _join(
        self, request: Request, node: _Node, block_ids: list[int], num_held: int
    ) -> list[int]:
        """Move a request's lock from its first ``num_held`` blocks on to ``node``, which somebody
        else has published; returns the blocks that replace spares."""
        found = [step for step in self._path(node) if step.start >= num_held]
        unlocked = [step for step in reversed(found) if step.locks <= 0]
        held_node = found[-1].parent
        self._acquire(node)
        if num_held:
            self._release(held_node)
        self._order.use(found, request.priority, 0)
        replaced: list[int] = []
        for step in unlocked:
            self._spares += step.blocks
            step.blocks = block_ids[step.start : step.start + len(step.blocks)]
            replaced += step.blocks
        self.num_blocks += len(replaced)
        self.num_evictable += len(replaced)
        self._num_inserted += len(replaced)
        return replaced

    def _add(
        self, request: Request, node: _Node, start: int, block_ids: list[int], extend: bool
    ) -> _Node:
        """Append blocks below a node that the request has locked (or the root), locked by it.

        ``extend`` says that the node was the request's before. Where nobody else's prefix ends
        with it or goes on from it, it grows; else the lock on it stays, as that of a locked child.
        """
        size = self._block_bytes
        data: bytearray = request.prefix_key
        tokens = data[start * size : (start + len(block_ids)) * size]
        self.num_blocks += len(block_ids)
        self._num_inserted += len(block_ids)
        if extend and node.locks == 1 and not node.children:
            node.tokens += tokens
            node.blocks += block_ids
            return node
        first = bytes(tokens[:size])
        key: _ChildKey = first
        if node is self._root:
            node.locks += 1
            key = request.extra_keys, first
        leaf = _Node(tokens, block_ids, start, node, key, 1)
        node.children[key] = leaf
        parent = None if node is self._root else node
        self._order.add((leaf,), parent, request.priority)
        return leaf

    def _evict(self, num_blocks: int) -> list[int]:
        freed: list[int] = []
        while len(freed) < num_blocks:
            leaf = self._order.first()
            assert leaf is not None, "unlocked blocks miscounted"
            missing = num_blocks - len(freed)
            if missing < len(leaf.blocks):
                freed += leaf.blocks[: -missing - 1 : -1]
                del leaf.blocks[-missing:], leaf.tokens[-missing * self._block_bytes :]
                break
            self._order.pop()
            freed += reversed(leaf.blocks)
            del leaf.parent.children[leaf.key]
            leaf.blocks = []  # a match that still leads here is found out
        self.num_blocks -= num_blocks
        self.num_evictable -= num_blocks
        return freed

    # -- books --------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[_Node]:
        """All nodes but the root, parents before their children."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def block_ids(self) -> list[int]:
        return [block for node in self._nodes() for block in node.blocks] + self._spares

    def counters(self) -> dict[str, float]:
        return super().counters() | {"node_splits": self._num_splits}

    def reset_counters(self) -> None:
        super().reset_counters()
        self._num_splits = 0

    def check_integrity(self) -> None:
        nodes = [*self._nodes()]
        for node in [self._root, *nodes]:
            locked = sum(child.locks > 0 for child in node.children.values())
            assert max(0, node.locks) >= locked, "a locked node hangs under an unlocked one"
            for key, child in node.children.items():
                first = bytes(child.tokens[: self._block_bytes])
                assert key == child.key, "a child is found under another key than its own"
                assert (key[1] if isinstance(key, tuple) else key) == first, "a key is stale"
                assert isinstance(key, tuple) == (node is self._root), "a key without its root"
                assert child.parent is node, "a child does not know its parent"
                assert child.start == node.start + len(node.blocks), "a run starts elsewhere"
        for node in nodes:
            assert node.blocks, "a node without blocks"
            assert len(node.tokens) == len(node.blocks) * self._block_bytes, "tokens and blocks"
        unlocked = {node for node in nodes if node.locks <= 0}
        self._order.check(unlocked, set(nodes))
        blocks = self.block_ids()
        assert len(blocks) == self.num_blocks == len(set(blocks)), "a block counted wrong or twice"
        evictable = sum(len(node.blocks) for node in unlocked) + len(self._spares)
        assert self.num_evictable == evictable, "unlocked blocks miscounted"
