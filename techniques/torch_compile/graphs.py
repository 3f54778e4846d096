"""torch.compile of functions whose first dimension may have any size, one graph a function."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

from workbench.core.errors import UnsupportedError

_NUMBERS = itertools.count()


class CompiledFunction:
    """A function of tensors ``[T, ...]``, compiled by Inductor on its first call, for every ``T``.

    All other sizes and strides are those of that first call, and so are torch's modes and number
    of threads: a caller keeps one object for each combination.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
        self._name, self._options = name, options
        # Closures of one function share their code, and torch keeps two things by it: graphs, of
        # which it allows each code object a few, and by the code's name which sizes have been seen
        # to change, which are dynamic from then on. So each gets code with a name of its own.
        self._code = function.__code__.replace(co_name=f"{name}_{next(_NUMBERS)}")
        own = types.FunctionType(
            self._code, function.__globals__, name, function.__defaults__, function.__closure__
        )
        self._function: Callable[..., Any] = torch.compile(own, fullgraph=True, backend=self._build)

    @property
    def num_graphs(self) -> int:
        """Graphs that torch holds for it: 1 after the first call, 0 after ``torch._dynamo.reset``,
        which others in the process may call."""
        return len(_debug_get_cache_entry_list(self._code))

    def _build(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        import torch._inductor

        built: Callable[..., Any] = torch._inductor.compile(graph, examples, self._options)
        return built

    def __call__(self, *tensors: Tensor, rows: int) -> Any:
        """Call it; the first ``rows`` of the tensors have ``T`` as their first dimension.

        Raises
        ------
        RuntimeError
            It would have to be compiled while a CUDA graph is captured.
        UnsupportedError
            It was compiled again.
        """
        if self.num_graphs:
            result = self._function(*tensors)
            if self.num_graphs > 1:
                raise UnsupportedError(
                    f"{self._name} was compiled again for tensors of a form that it had been "
                    "compiled for, because a state of torch's has changed since, such as "
                    "torch.use_deterministic_algorithms. Leave it as it was when the engine first "
                    "ran, or take engine/ops=dispatched."
                )
            return result
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._name} has to be compiled before a CUDA graph is captured: run the same "
                "call once outside of the capture"
            )
        # Marked on views: marks stay on a tensor, and these tensors are the caller's. A size that
        # is not known when the graph is made is no reason to make another one, not even 0 or 1.
        marked = [t.view(t.shape) for t in tensors[:rows]]
        for tensor in marked:
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        return self._function(*marked, *tensors[rows:])
