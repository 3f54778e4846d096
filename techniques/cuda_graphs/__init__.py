"""Steps of single tokens as CUDA graphs."""

from techniques.cuda_graphs.runner import CudaGraphConfig, CudaGraphRunner

__all__ = ["CudaGraphConfig", "CudaGraphRunner"]
