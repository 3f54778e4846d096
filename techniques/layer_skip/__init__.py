"""Self-speculation: the target's own first layers draft, all of them verify.

Elhoushi et al. 2024, LayerSkip, arXiv:2404.16710; Zhang et al. 2023, Draft & Verify,
arXiv:2309.08168. Losslessness: exact. Evidence: ``drafted_tokens``, ``draft_passes``,
``accepted_tokens``.
"""

from techniques.layer_skip.drafter import LayerSkip, LayerSkipConfig

__all__ = ["LayerSkip", "LayerSkipConfig"]
