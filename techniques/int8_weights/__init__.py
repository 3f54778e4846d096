"""Weights of 8 bits with one scale an output, rounded to nearest as they are loaded.

Losslessness: lossy. Evidence: ``quantized_layers``, ``packed_bytes``. The code is
``techniques.quantization.WeightOnly``.
"""
