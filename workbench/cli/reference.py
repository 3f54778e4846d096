"""Transformers' greedy outputs as the reference of the correctness gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from workbench.baselines.reference import ReferenceModel
from workbench.bench.gates import Outputs
from workbench.bench.progress import Progress
from workbench.cli.variants import ModelForBaselines
from workbench.core.backend import TokenEvent
from workbench.core.errors import RequestError, WorkbenchError
from workbench.core.workload import WorkloadRequest


class HfReference:
    """Reference outputs, computed once; and margins of outputs that differ.

    A context manager: the model is given back at the end.
    """

    def __init__(
        self, model: ModelForBaselines, requests: Sequence[WorkloadRequest], progress: Progress
    ) -> None:
        self._model = ReferenceModel(model.folder, model.dtype, model.device)
        self._prompts = {r.request_id: r.prompt_token_ids for r in requests}
        self._progress = progress

    def outputs(self, requests: Sequence[WorkloadRequest]) -> Outputs:
        """Greedy outputs by request id; requests that no engine could serve are left out."""
        self._progress.begin("reference (HF, greedy)", len(requests), time.perf_counter())
        found: dict[str, tuple[int, ...]] = {}
        for request in requests:
            try:
                reference = self._model.generate(
                    request.prompt_token_ids, request.max_tokens, request.ignore_eos
                )
            except RequestError:
                continue
            found[request.request_id] = reference.token_ids
            self._progress.on_event(
                TokenEvent(request.request_id, time.perf_counter(), reference.token_ids, True)
            )
        return found

    def margins(self, request_id: str, output_token_ids: Sequence[int]) -> Sequence[float]:
        """How far each output token lies from the reference's choice, in logits."""
        return self._model.margins_of(self._prompts[request_id], output_token_ids)

    def __enter__(self) -> HfReference:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model.close()


def scored(
    engine_outputs: Callable[[Sequence[WorkloadRequest]], Outputs],
    hf: HfReference,
    epsilon: float,
    progress: Progress,
) -> Callable[[Sequence[WorkloadRequest]], Outputs]:
    """An engine's own outputs as the reference, once Transformers has stood by every token.

    One forward pass over prompt and output says how far each token lies from the one that
    Transformers would have chosen after the same tokens. That holds every token of every request,
    and costs a prefill a request where generating the reference costs a decode step a token: the
    way for loads that Transformers would take hours to serve.

    Parameters
    ----------
    epsilon
        In logits: what a token may lie behind the choice; 0 asks for the very choice.

    Raises
    ------
    WorkbenchError
        From the function that is returned: an output is empty or not as long as it must be, or a
        token lies too far behind, or nothing can be said of it (a margin that is no number).
    """

    def outputs(requests: Sequence[WorkloadRequest]) -> Outputs:
        found = engine_outputs(requests)
        by_id = {request.request_id: request for request in requests}
        progress.begin("reference (outputs scored by HF)", len(found), time.perf_counter())
        for request_id, tokens in found.items():
            request = by_id[request_id]
            if not tokens or (request.ignore_eos and len(tokens) != request.max_tokens):
                raise WorkbenchError(
                    f"request {request_id!r} brought {len(tokens)} of {request.max_tokens} output "
                    "tokens: the engine that was to give the reference is wrong."
                )
            margins = hf.margins(request_id, tokens)
            # Written so that a NaN margin is too far.
            worst = next((i for i, margin in enumerate(margins) if not margin <= epsilon), None)
            if worst is not None:
                raise WorkbenchError(
                    f"output token {worst} of request {request_id!r} lies {margins[worst]:.3g} "
                    f"logits behind Transformers' choice, more than {epsilon:g}: the engine that "
                    "was to give the reference is wrong."
                )
            progress.on_event(TokenEvent(request_id, time.perf_counter(), tuple(tokens), True))
        return found

    return outputs
