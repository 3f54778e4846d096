"""Decode first: new prompts interrupt running requests only now and then.

Sarathi-Serve's decode-prioritising schedulers, Agrawal et al. 2024, arXiv:2403.02310. Losslessness:
exact. Evidence: ``held_back_steps``.
"""

from techniques.scheduling_policies import DecodeFirst, DecodeFirstConfig

__all__ = ["DecodeFirst", "DecodeFirstConfig"]
