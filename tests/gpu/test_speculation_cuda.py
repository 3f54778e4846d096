"""Verifiers and drafters on a CUDA device: the CPU's tokens, and no wait where none is needed.

python -m pytest tests/gpu/test_speculation_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_speculation_cuda.py  # the same, where there is no pytest
"""

from __future__ import annotations

import torch

from tests.helpers.engines import component, needed_settings
from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import SamplingMetadata
from workbench.slots.verifier import DraftsToVerify

VERIFIERS = ("exact_match", "rejection", "typical", "synthetic")
TECHNIQUES = {
    "ngram": ("spec_decode",),
    "suffix": ("suffix_decoding",),
    "rejection": ("rejection_sampling",),
    "typical": ("typical_acceptance",),
    "adaptive": ("spec_decode", "adaptive_drafts"),
    "suffix tree": ("suffix_decoding", "suffix_tree"),
    "lookahead": ("lookahead_decoding",),
    "draft model": ("draft_model",),
    "layer skip": ("layer_skip",),
    "eagle": ("eagle",),
    "eagle tree": ("eagle", "eagle_tree"),
    "medusa": ("medusa",),
    "medusa tree": ("medusa", "medusa_tree"),
    "mtp": ("mtp",),
}
GRAPHS = ("triton_attention", "cuda_graphs")
NUM_REQUESTS, NUM_DRAFTS, VOCAB = 64, 4, 512


def batch(
    device: str, params: SamplingParams, *, with_probs: bool
) -> tuple[DraftsToVerify, torch.Tensor, SamplingMetadata]:
    generator = torch.Generator().manual_seed(0)
    rows = NUM_REQUESTS * (NUM_DRAFTS + 1)
    logits = torch.randn(rows, VOCAB, generator=generator) * 4
    likeliest = logits.argmax(-1).reshape(NUM_REQUESTS, -1)[:, :-1]
    drafts = torch.where(
        torch.rand(likeliest.shape, generator=generator) < 0.7, likeliest, likeliest // 2
    )
    drafts[::5, 2:] = -1
    noise = torch.randn(NUM_REQUESTS, NUM_DRAFTS, VOCAB, generator=generator)
    plain = params.is_greedy and params.logprobs is None
    return (
        DraftsToVerify(
            drafts.to(device),
            torch.arange(0, rows, NUM_DRAFTS + 1, device=device),
            torch.softmax(noise, -1).to(device) if with_probs else None,
        ),
        logits.to(device),
        SamplingMetadata(
            params=[] if plain else [params] * rows,
            positions=torch.arange(rows, device=device),
            seeds=torch.arange(rows, device=device) // (NUM_DRAFTS + 1),
            all_greedy=params.is_greedy,
            any_logprobs=params.logprobs is not None,
        ),
    )


def check_tokens_are_those_of_the_cpu() -> None:
    settings = (
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, logprobs=2),
    )
    for name in VERIFIERS:
        for params in settings:
            for with_probs in (False, True):
                found = [
                    component("verifier", name)
                    .verify(
                        *batch(device, params, with_probs=with_probs),
                        component("sampler", "torch"),
                    )
                    .token_ids.cpu()
                    for device in ("cpu", "cuda")
                ]
                differ = int((found[0] != found[1]).any(1).sum())
                # A number may fall between two sums that are rounded otherwise.
                assert differ <= 1, f"{name}, {params}: {differ} of {NUM_REQUESTS} requests differ"


def check_greedy_verification_does_not_wait() -> None:
    for name in VERIFIERS:
        verifier, sampler = component("verifier", name), component("sampler", "torch")
        arguments = batch("cuda", SamplingParams(), with_probs=False)
        verifier.verify(*arguments, sampler)  # the first one may make its buffers
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            verifier.verify(*arguments, sampler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert verifier.counters()["verifications"] == 2 * NUM_REQUESTS


def check_engines_write_what_they_write_without_drafts() -> None:
    expected, _ = outputs()
    for name, techniques in TECHNIQUES.items():
        found, counters = outputs(*techniques)
        assert found == expected, name
        assert counters["drafter.failures"] == 0
        assert name in ("adaptive", "layer skip") or counters["verifier.accepted_tokens"] > 0, name


def outputs(*techniques: str) -> tuple[list[list[int]], dict[str, float]]:
    """What an engine with these techniques writes, and its counters."""
    folder = tiny_model("llama", vocab_size=VOCAB)
    prompts = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
    names = ",".join(("continuous_batching", "paged_attention", *techniques))
    chosen = [f"+technique=[{names}]", *needed_settings(techniques, folder)]
    composed = compose_config([f"model={folder}", "dtype=float32", "engine/platform=cuda", *chosen])
    limits = Limits(max_num_seqs=3, max_model_len=128, kv_pool_tokens=512)
    engine = build_engine(engine_config(composed, limits, download=False))
    found = engine.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    return [o.token_ids for o in found], engine.counters()


def check_models_draft_in_graphs() -> None:
    expected, _ = outputs(*GRAPHS)
    for name in ("draft_model", "layer_skip", "eagle", "mtp"):
        found, counters = outputs(*GRAPHS, name)
        assert found == expected, name
        assert counters["drafter.failures"] == 0
        assert counters["graph_runner.draft_replays"] > 5, name
        assert counters["graph_runner.verify_replays"] > 5, name
        if name == "eagle":
            _, launched = outputs(*GRAPHS[:1], name)
            most = launched["verifier.accepted_tokens"]
            assert 0 < 0.9 * most <= counters["verifier.accepted_tokens"] <= 1.1 * most + 1
        if name == "draft_model":  # the target itself
            assert counters["verifier.acceptance_rate"] > 0.97, counters["verifier.acceptance_rate"]


CHECKS = {
    "tokens are those of the CPU": check_tokens_are_those_of_the_cpu,
    "greedy verification does not wait": check_greedy_verification_does_not_wait,
    "engines write what they write without drafts": (
        check_engines_write_what_they_write_without_drafts
    ),
    "models draft in graphs": check_models_draft_in_graphs,
}


def test_speculation_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
