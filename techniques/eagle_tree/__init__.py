"""Trees of drafts that grow where a trained head is most confident.

Li et al. 2024, EAGLE-2, arXiv:2406.16858. Losslessness: exact. Evidence: ``branching_trees``,
``accepted_tokens``. The code is the ``tree`` option of ``techniques.eagle``.
"""
