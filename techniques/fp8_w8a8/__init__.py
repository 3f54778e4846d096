"""Weights and activations in fp8, weights rounded to nearest as they are loaded.

Losslessness: lossy. Evidence: ``quantized_layers``, ``packed_bytes``, ``quantized_calls``. The code
is ``techniques.quantization.ScaledWeights``.
"""
