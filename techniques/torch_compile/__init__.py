"""The elementwise work of a layer fused by torch.compile instead of by hand.

Ansel et al., "PyTorch 2", ASPLOS 2024. Losslessness: exact. Evidence: ``ops.rms_norm_calls``,
``ops.add_rms_norm_calls``, ``ops.activation_calls`` and ``ops.graphs``.
"""

from techniques.torch_compile.ops import CompiledOps, CompiledOpsConfig

__all__ = ["CompiledOps", "CompiledOpsConfig"]
