"""Suffix decoding with trees: several continuations are checked in one pass.

Oliaro et al. 2024, arXiv:2411.04975; Miao et al. 2023, SpecInfer, arXiv:2305.09781. Losslessness:
exact. Evidence: ``branching_trees``, ``accepted_tokens``. The code is the ``tree`` option of
``techniques.suffix_decoding``.
"""
