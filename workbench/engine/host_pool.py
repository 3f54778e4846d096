"""KV blocks in host memory, and the copies between them and the device's pool.

On a CUDA device no copy holds the forward pass up longer than it must. What goes out is gathered
into a staging buffer, by the device and at its own bandwidth, so that the pool's blocks may be
written at once; the way to the host is taken on a second stream. What comes in takes that stream
too, and only the last part, into the pool's blocks, stands before the forward pass. This is what
serving systems with a host tier do (Kwon et al. 2023, arXiv:2309.06180, section 4.5, and the
offloading of vLLM and SGLang); the staging keeps copies large where blocks are scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from workbench.slots.kv_pool import KVPool

#: Bytes of device memory that copies pass through, all buffers together.
STAGING_BYTES = 64 << 20
_NUM_STAGINGS = 2  # one is filled while the other is emptied
#: Pinned memory is given out in powers of two, so it is asked for in pieces of one.
_SEGMENT_BYTES = 256 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Work = Callable[[], object]


def most_staging_bytes(bytes_per_block: int) -> int:
    """Most device memory that the copies of a host tier pass through."""
    return max(STAGING_BYTES, _NUM_STAGINGS * bytes_per_block)


class Lanes(Protocol):
    """Two queues of work: ``main`` is where the model runs, ``side`` is for the way to the host.

    Work of one queue runs in order; a mark says how far a queue has come.
    """

    def main(self, work: Work) -> None:
        """Queue work on the main lane."""
        ...

    def side(self, work: Work) -> None:
        """Queue work on the side lane."""
        ...

    def mark_main(self) -> Any:
        """A mark behind all that the main lane has in its queue."""
        ...

    def mark_side(self) -> Any:
        """A mark behind all that the side lane has in its queue."""
        ...

    def main_waits(self, mark: Any) -> None:
        """The main lane goes on once the mark is reached; None is reached at once."""
        ...

    def side_waits(self, mark: Any) -> None:
        """The side lane goes on once the mark is reached; None is reached at once."""
        ...


class ImmediateLanes:
    """Both lanes are the calling thread: for a device whose work is done when a call returns."""

    def main(self, work: Work) -> None:
        work()

    def side(self, work: Work) -> None:
        work()

    def mark_main(self) -> None: ...

    def mark_side(self) -> None: ...

    def main_waits(self, mark: None) -> None: ...

    def side_waits(self, mark: None) -> None: ...


class CudaLanes:
    """The current stream, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.device = device

    def main(self, work: Work) -> None:
        work()

    def side(self, work: Work) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def mark_main(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def mark_side(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def main_waits(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def side_waits(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            self.stream.wait_event(mark)


class _Staging:
    """A buffer on the device for a chunk of blocks, by tensor of the pool ``[n, ...]``."""

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int) -> None:
        self.tensors = [
            torch.zeros(num_blocks, *t.shape[1:], dtype=t.dtype, device=t.device) for t in tensors
        ]
        #: Mark behind the last work that used it.
        self.last_use: Any = None


class HostPool:
    """Holds ``num_blocks`` host blocks, and copies between them and the pool's.

    Parameters
    ----------
    pool
        Whose blocks are copied, all tensors of them whole.
    num_blocks
        Host blocks; 0 takes no memory.
    staging_bytes
        Device memory that copies pass through; larger ones go in chunks.
    lanes
        Where the work is queued; by the pool's device if left out.
    """

    def __init__(
        self,
        pool: KVPool,
        num_blocks: int,
        *,
        staging_bytes: int = STAGING_BYTES,
        lanes: Lanes | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        tensors = pool.block_tensors() if num_blocks else []
        self._device = [_as_words(tensor) for tensor in tensors]
        bytes_per_block = sum(t[0].numel() * t.element_size() for t in tensors)
        #: Bytes of host memory.
        self.num_bytes = num_blocks * bytes_per_block
        is_cuda = bool(tensors) and tensors[0].is_cuda
        self._host = [self._allocate(tensor, is_cuda) for tensor in self._device]
        self._chunk_blocks = 0
        if num_blocks:
            fitting = staging_bytes // _NUM_STAGINGS // bytes_per_block
            self._chunk_blocks = min(num_blocks, max(1, fitting))
        self._stagings = [_Staging(self._device, self._chunk_blocks) for _ in range(_NUM_STAGINGS)]
        #: Bytes of the device's memory: the staging, and all where it is the host's own.
        self.num_device_bytes = _NUM_STAGINGS * self._chunk_blocks * bytes_per_block
        self.num_device_bytes += 0 if is_cuda else self.num_bytes
        self._lanes: Lanes = lanes or self._lanes_of(tensors)

    def _allocate(self, tensor: torch.Tensor, pinned: bool) -> list[torch.Tensor]:
        """Host blocks of a tensor of the pool, in segments ``[n, ...]``."""
        size = max(1, _SEGMENT_BYTES // (tensor[0].numel() * tensor.element_size()))
        counts = [min(size, self.num_blocks - n) for n in range(0, self.num_blocks, size)]
        # Zeroed, so that memory is taken now, where the ledger says.
        return [
            torch.zeros(n, *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pinned) for n in counts
        ]

    def _lanes_of(self, tensors: Sequence[torch.Tensor]) -> Lanes:
        if not tensors or not tensors[0].is_cuda:
            return ImmediateLanes()
        lanes = CudaLanes(tensors[0].device)
        for staging in self._stagings:
            for tensor in staging.tensors:
                tensor.record_stream(lanes.stream)
        return lanes

    def copy(self, out: Sequence[tuple[int, int]], into: Sequence[tuple[int, int]]) -> None:
        """Queue the copies of a plan, before the work that it plans.

        Parameters
        ----------
        out
            (device block, host block): these are read as earlier work left them.
        into
            (host block, device block), as all of ``out`` leave the host. What is queued on the main
            lane afterwards reads the device blocks as these leave them.
        """
        for blocks, hosts in self._chunks(out):
            self._send(blocks, hosts)
        for hosts, blocks in self._chunks(into):
            self._fetch(hosts, blocks)

    def _chunks(
        self, pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sources and targets, as many at once as the staging holds."""
        assert not pairs or self.num_blocks, "copies are planned, but there is no host tier"
        assert len({target for _, target in pairs}) == len(pairs), "a block is written twice"
        for first in range(0, len(pairs), max(1, self._chunk_blocks)):
            sources, targets = zip(*pairs[first : first + self._chunk_blocks], strict=True)
            yield sources, targets

    def _next_staging(self) -> _Staging:
        staging = self._stagings.pop(0)
        self._stagings.append(staging)
        return staging

    def _send(self, blocks: tuple[int, ...], hosts: tuple[int, ...]) -> None:
        staging, lanes = self._next_staging(), self._lanes

        def gather() -> None:
            index = torch.tensor(blocks).to(self._device[0].device, non_blocking=True)
            for tensor, buffer in zip(self._device, staging.tensors, strict=True):
                torch.index_select(tensor, 0, index, out=buffer[: len(blocks)])

        def send() -> None:
            for host, buffer in zip(self._host, staging.tensors, strict=True):
                for first, target in self._runs(host, hosts):
                    target.copy_(buffer[first : first + len(target)], non_blocking=True)

        lanes.main_waits(staging.last_use)
        lanes.main(gather)
        lanes.side_waits(lanes.mark_main())
        lanes.side(send)
        staging.last_use = lanes.mark_side()

    def _fetch(self, hosts: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        staging, lanes = self._next_staging(), self._lanes

        def fetch() -> None:
            for host, buffer in zip(self._host, staging.tensors, strict=True):
                for first, source in self._runs(host, hosts):
                    buffer[first : first + len(source)].copy_(source, non_blocking=True)

        def scatter() -> None:
            index = torch.tensor(blocks).to(self._device[0].device, non_blocking=True)
            for tensor, buffer in zip(self._device, staging.tensors, strict=True):
                tensor.index_copy_(0, index, buffer[: len(blocks)])

        lanes.side_waits(staging.last_use)
        lanes.side(fetch)
        lanes.main_waits(lanes.mark_side())
        lanes.main(scatter)
        staging.last_use = lanes.mark_main()

    def _runs(
        self, segments: list[torch.Tensor], hosts: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Views ``[n, ...]`` of host blocks that lie side by side, and where each begins."""
        assert 0 <= min(hosts) <= max(hosts) < self.num_blocks, "no such host block"
        size = len(segments[0])
        cuts = [0]
        for i, (a, b) in enumerate(pairwise(hosts), start=1):
            if b != a + 1 or b % size == 0:
                cuts.append(i)
        for first, stop in pairwise([*cuts, len(hosts)]):
            segment, at = divmod(hosts[first], size)
            yield first, segments[segment][at : at + stop - first]


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as the widest integers that fit, since bytes are all that is copied."""
    size = tensor.element_size()
    strides = (*tensor.stride()[:-1], tensor.storage_offset(), tensor.shape[-1])
    for width, dtype in _WORDS.items():
        if width <= size:
            break
        if tensor.stride(-1) == 1 and all(s * size % width == 0 for s in strides):
            return tensor.view(dtype)
    return tensor.view(_WORDS[size])
