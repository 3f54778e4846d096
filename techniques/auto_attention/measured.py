"""Which backend is fastest where: rankings from records of ``experiments.gpu_attention`` and
``experiments.gpu_prefill``, by compute capability and kind of step.

The figures are in ``results/``; a backend that was not measured on a device is not in its ranking,
except for the last one, which serves anything.
"""

from __future__ import annotations

from techniques.attention import Phase

#: Class of each backend that may be picked.
CLASSES = {
    "triton": "techniques.triton_attention.TritonAttention",
    "flash_attn": "techniques.flash_attention_cute.FlashAttention",
    "flashinfer": "techniques.flashinfer_attention.FlashInferAttention",
    "sdpa": "workbench.slots.attention.SdpaAttention",
}

#: Fastest first. Key: compute capability, or None for everything that has no row of its own.
#: On 9.0, decoding, the first two are within the noise of each other and the first plans nothing on
#: the host. Otherwise the second is faster than the third where single tokens stand beside a piece
#: of a prompt, as in most steps of that kind, and slower on whole prompts.
RANKINGS: dict[tuple[int, int] | None, dict[Phase, tuple[str, ...]]] = {
    (9, 0): {
        "decode": ("triton", "flashinfer", "flash_attn", "sdpa"),
        "prefill": ("flash_attn", "triton", "flashinfer", "sdpa"),
    },
    None: {"decode": ("triton", "sdpa"), "prefill": ("triton", "sdpa")},
}
_ANY_CPU: tuple[str, ...] = ("sdpa",)


def ranking(capability: tuple[int, int] | None, phase: Phase) -> tuple[str, ...]:
    """Backends to try, best first; ``capability`` is None where there is no GPU."""
    if capability is None:
        return _ANY_CPU
    return RANKINGS.get(capability, RANKINGS[None])[phase]
