"""Weights of 4 bits in groups of inputs, rounded to nearest as they are loaded.

Losslessness: lossy. Evidence: ``quantized_layers``, ``packed_bytes``. The code is
``techniques.quantization.WeightOnly``.
"""
