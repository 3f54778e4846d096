"""Trees of the likeliest tokens of several heads.

Cai et al. 2024, Medusa, arXiv:2401.10774. Losslessness: exact. Evidence: ``branching_trees``,
``accepted_tokens``. The code is the ``tree`` option of ``techniques.medusa``.
"""
