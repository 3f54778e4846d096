"""Steps of single tokens, and steps that verify drafts, as CUDA graphs."""

from techniques.cuda_graphs.runner import CudaGraphConfig, CudaGraphRunner

__all__ = ["CudaGraphConfig", "CudaGraphRunner"]
