"""Slot ``sampler``: from logits to token ids."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch

import kernels
from workbench.core.sampling import SamplingParams
from workbench.core.step import TokenLogprobs
from workbench.slots.component import Component

#: Temperatures below it would be zero in single precision.
_COLDEST = 1e-37


@dataclass(slots=True)
class SamplingMetadata:
    """How ``L`` rows of logits are to be drawn.

    Attributes
    ----------
    params : list[SamplingParams]
        One a row of logits (rows of one verified draft repeat their request's).
    all_greedy, any_penalties, any_logprobs : bool
        Let the common case skip the work.
    positions : Tensor[L] int64
        Position of the token being drawn, which with the seed fixes the draw: a request's tokens
        do not depend on its batch, on chunking or on speculation.
    seeds : Tensor[L] int64
    contexts : list[Tensor[n] int64]
        Tokens before each drawn one, where penalties ask for them (empty list otherwise).
    num_prompt_tokens : list[int]
    """

    params: list[SamplingParams]
    positions: torch.Tensor
    seeds: torch.Tensor
    all_greedy: bool = True
    any_penalties: bool = False
    any_logprobs: bool = False
    contexts: list[torch.Tensor] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Drawn ids ``[L]`` int64 on the logits' device, and log-probabilities where asked for."""

    token_ids: torch.Tensor
    logprobs: list[TokenLogprobs | None] | None = None


class Sampler(Component):
    """Draws tokens; greedy is always legal, and a seed fixes a request's draws."""

    @abstractmethod
    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Draw one token a row of ``logits[L, V]`` (the model's dtype; may be overwritten)."""

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why it cannot draw from logits of ``dtype`` on ``device``; empty when it can."""
        return []


class TorchSampler(Sampler):
    """Plain torch operations, on every device: the null object.

    Draws by inverting the cumulative distribution at one uniform number a row. That number is a
    hash of (seed, position) (SplitMix64, Steele et al. 2014), so it is the same on every device.
    """

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        if metadata.all_greedy and not (metadata.any_penalties or metadata.any_logprobs):
            return SamplerOutput(kernels.argmax(logits))
        logits = logits.float()
        raw = logits.clone() if metadata.any_logprobs else logits
        if metadata.any_penalties:
            apply_penalties(logits, metadata)
        token_ids = kernels.argmax(logits)
        if not metadata.all_greedy:
            rows = [i for i, p in enumerate(metadata.params) if not p.is_greedy]
            index = torch.tensor(rows, device=logits.device)
            probs = truncated_probs(logits[index], [metadata.params[i] for i in rows])
            uniform = uniform_from_seed(metadata.seeds[index], metadata.positions[index])
            token_ids[index] = invert_cdf(probs, uniform)
        logprobs = find_logprobs(raw, token_ids, metadata.params) if metadata.any_logprobs else None
        return SamplerOutput(token_ids, logprobs)


def target_probs(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """What each row of ``logits[L, V]`` is drawn from, float32 ``[L, V]`` of any sum: after
    penalties, temperature and truncation; a greedy row has one token. May overwrite ``logits``."""
    logits = logits.float()
    if metadata.any_penalties:
        apply_penalties(logits, metadata)
    greedy = [i for i, p in enumerate(metadata.params) if p.is_greedy]
    if not greedy:
        return truncated_probs(logits, metadata.params)
    likeliest = kernels.argmax(logits)
    probs = torch.zeros_like(logits)
    if len(greedy) < len(metadata.params):
        probs = truncated_probs(logits, metadata.params)
        probs[torch.tensor(greedy, device=logits.device)] = 0.0
    index = torch.tensor(greedy, device=logits.device)
    probs[index, likeliest[index]] = 1.0
    return probs


def uniform_from_seed(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) a row, float64 ``[L]``, from int64 seeds and positions ``[L]``."""
    x = seeds + positions * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64, which torch has only as an arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def invert_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw an index a row of ``probs[L, V]``, of any sum, at ``uniform[L]``; int64 ``[L]``."""
    cumulative = probs.double().cumsum(-1)
    target = (uniform * cumulative[:, -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A target that rounds up to the total would fall past the end: take the last token with mass.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(drawn, last)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32).unsqueeze(-1)


def truncated_probs(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Probabilities ``[L, V]`` after temperature, top-k, top-p and min-p, in that order."""
    # The largest becomes 0 first: however cold, it stays finite while the others go to -inf.
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    logits = logits / _column([max(p.temperature, _COLDEST) for p in params], logits)
    if any(p.top_k for p in params):
        vocab = logits.shape[-1]
        limit = [min(p.top_k or vocab, vocab) for p in params]
        largest = torch.topk(logits, max(min(k, vocab) for k in limit), dim=-1).values
        last = torch.tensor(limit, device=logits.device).unsqueeze(-1) - 1
        logits = logits.masked_fill(logits < largest.gather(-1, last), -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if any(p.top_p < 1.0 for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        drop = before >= _column([p.top_p for p in params], logits)
        drop &= _column([p.top_p for p in params], logits) < 1.0
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
    if any(p.min_p for p in params):
        floor = _column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def apply_penalties(logits: torch.Tensor, metadata: SamplingMetadata) -> None:
    """Penalise in place, row by row: repetition over prompt and output, the others over output."""
    for row, params in enumerate(metadata.params):
        if not params.has_penalties:
            continue
        context = metadata.contexts[row]
        line = logits[row]
        if params.repetition_penalty != 1.0:
            seen = torch.unique(context)
            values = line[seen]
            r = params.repetition_penalty
            line[seen] = torch.where(values > 0, values / r, values * r)
        output = context[metadata.num_prompt_tokens[row] :]
        if output.numel() and (params.presence_penalty or params.frequency_penalty):
            seen, counts = torch.unique(output, return_counts=True)
            line[seen] -= params.presence_penalty + params.frequency_penalty * counts.to(line.dtype)


def find_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, params: list[SamplingParams]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the drawn ids and the likeliest ones, for the rows that want them.

    Of the raw distribution, before penalties and temperature. Waits for the device.
    """
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    result: list[TokenLogprobs | None] = [None] * len(params)
    index = torch.tensor(wanted, device=logits.device)
    scores = torch.log_softmax(logits[index].float(), dim=-1)
    chosen = scores.gather(-1, token_ids[index].unsqueeze(-1)).squeeze(-1).tolist()
    most = max(params[i].logprobs or 0 for i in wanted)
    values, ids = scores.topk(min(most, scores.shape[-1]), dim=-1)
    for line, i in enumerate(wanted):
        k = params[i].logprobs or 0
        pairs = zip(ids[line, :k].tolist(), values[line, :k].tolist(), strict=True)
        result[i] = TokenLogprobs(int(token_ids[i]), chosen[line], tuple(pairs))
    return result
