"""The target's own multi-token-prediction module drafts.

DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024, arXiv:2412.19437, section 2.2; Xiaomi, *MiMo*,
2025, arXiv:2505.07608. Losslessness: exact. Evidence: ``drafted_tokens``, ``draft_passes``,
``accepted_tokens``.
"""

from techniques.mtp.drafter import Mtp, MtpConfig

__all__ = ["Mtp", "MtpConfig"]
