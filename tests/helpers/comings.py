"""Requests that come and go while others run, and drafts that do."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.helpers.engines import check_idle, mixed_prompts
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.slots.draft_length import DraftLength, VerifiedStep


@dataclass
class Traffic:
    """Requests that arrive and are aborted at given steps."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    arrivals: list[int]
    aborted: dict[int, int]  # request to step

    def serve(self, engine: Engine) -> dict[int, tuple[list[int], str | None]]:
        """Tokens and end of each request, as they came out step by step."""
        tokens: dict[int, list[int]] = {i: [] for i in range(len(self.prompts))}
        ended: dict[int, str | None] = {}
        step = 0
        while len(ended) < len(self.prompts):
            for i, arrival in enumerate(self.arrivals):
                if arrival == step:
                    engine.add_request(self.prompts[i], self.params[i], f"r{i}")
                if self.aborted.get(i) == step and i not in ended:
                    engine.abort(f"r{i}")
                    ended[i] = "abort"
            for output in engine.step():
                i = int(output.request_id[1:])
                tokens[i] += output.new_token_ids
                assert output.token_ids[: len(tokens[i])] == tokens[i]
                assert -1 not in output.token_ids, "a token that nobody knows came out"
                if output.finished:
                    ended[i] = output.outputs[0].finish_reason
                    assert output.token_ids == tokens[i]
            engine.check_integrity()
            step += 1
            assert step < 2000
        while engine.has_unfinished():
            engine.step()
        check_idle(engine)
        return {i: (tokens[i], ended[i]) for i in tokens}


def make_traffic(
    seed: int, stops: dict[int, tuple[int, ...]] | None = None, *, greedy: bool = False
) -> Traffic:
    """Fourteen requests, of which some share a beginning and three are aborted."""
    rng = random.Random(seed)
    prompts = mixed_prompts(14, seed=seed, longest=50)
    prompts = [p if rng.random() < 0.6 else prompts[0] + p for p in prompts]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 30),
            ignore_eos=True,
            stop_token_ids=list((stops or {}).get(i, ())),
            temperature=0.0 if greedy else rng.choice([0.0, 0.0, 0.8]),
            seed=i,
        )
        for i in range(len(prompts))
    ]
    arrivals = [rng.choice([0, 0, rng.randint(1, 20)]) for _ in prompts]
    aborted = {i: arrivals[i] + rng.randint(1, 30) for i in rng.sample(range(14), 3)}
    return Traffic(prompts, params, arrivals, aborted)


class NowAndThen(DraftLength):
    """Allows drafts in some steps, in runs of any length."""

    observes = True

    def __init__(self, seed: int, num_lookahead_tokens: int = 3) -> None:
        super().__init__(num_lookahead_tokens=num_lookahead_tokens)
        self.rng = random.Random(seed)
        self.allowed = 0
        self.seen: list[VerifiedStep] = []

    def choose(self, num_requests: int) -> int:
        if self.rng.random() < 0.3:
            self.allowed = 0 if self.allowed else self.rng.randint(1, self.num_lookahead_tokens)
        return self.allowed

    def observe(self, step: VerifiedStep) -> None:
        self.seen.append(step)
