"""Products by timed algorithms, on a CUDA device: ``python tests/gpu/test_tuned_gemm_cuda.py``."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels.cublaslt import TunedProducts

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(4096, 1024), (1024, 3072), (28672, 4096), (151936, 1024)]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_proposed_algorithm_multiplies(shape: tuple[int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    products = TunedProducts(device)
    weight = torch.randn(*shape, device=device, dtype=dtype) * 0.02
    for num_rows in (40, 256, 1024):
        x = torch.randn(num_rows, shape[1] + 8, device=device, dtype=dtype)[:, : shape[1]]
        truth = x.float() @ weight.float().T
        bound = 2 * torch.finfo(dtype).eps * truth.abs().max().item()
        products.linear(x, weight)
        key = next(key for key in products.tuned if key[0] == num_rows)
        tuned = products.tuned[key]
        algorithms = products._propose(tuned.layouts)
        assert algorithms
        for algorithm in algorithms:
            out = torch.full_like(truth, float("nan"), dtype=dtype)
            if products._run(algorithm, tuned.layouts, x, weight, out) == 0:
                assert (out.float() - truth).abs().max().item() <= bound
        products.tuned.clear()


@needs_cuda
def test_a_shape_keeps_its_algorithm_and_can_be_captured() -> None:
    device = torch.device("cuda", 0)
    products = TunedProducts(device)
    weight = torch.randn(1024, 3072, device=device, dtype=torch.bfloat16)
    for num_rows in range(8, 257, 8):
        x = torch.randn(num_rows, 3072, device=device, dtype=torch.bfloat16)
        eager = products.linear(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = products.linear(x, weight)
        assert (eager is None) == (captured is None)
        if eager is not None and captured is not None:
            graph.replay()
            assert torch.equal(eager, captured)
    assert len(products.tuned) == 32
    x = torch.randn(264, 3072, device=device, dtype=torch.bfloat16)
    assert products.linear(x, weight) is None and len(products.tuned) == 32


@needs_cuda
def test_what_was_not_timed_is_left_to_the_caller_while_a_graph_is_captured() -> None:
    products = TunedProducts(torch.device("cuda", 0))
    weight = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert products.linear(x, weight) is None
    assert not products.tuned


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
