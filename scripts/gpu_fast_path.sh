#!/usr/bin/env bash
# Checks and measures the fast path on one CUDA device: captured steps, overlap, fused kernels, products of few rows.
# usage: WORKBENCH_COMMIT=$(git rev-parse HEAD) OUT=folder scripts/gpu_fast_path.sh [PART]...
# Parts: checks, kernels, sanitize, peak, cascade, ablation, timeline.
# Without a part, all of them but sanitize, which takes long. Records go to $OUT; every part runs whether or not the one before it failed, and the exit
# status is that of the last one that did.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the records}"
export PYTHONPATH=".:${PYTHONPATH:-}"
status=0
do_run() { echo "== $*"; local start=$SECONDS; "$@" || status=$?; echo "-- $((SECONDS - start)) s, status $status"; }

for part in "${@:-checks kernels peak cascade ablation timeline}"; do
    for name in $part; do
        case $name in
        checks)
            do_run python3 tests/gpu/test_fast_path_cuda.py
            do_run python3 tests/gpu/test_batch_invariant_cuda.py
            do_run python3 tests/gpu/test_torch_compile_cuda.py
            do_run python3 tests/gpu/test_speculation_cuda.py
            do_run python3 tests/gpu/test_memory_cuda.py
            do_run python3 -m pytest -q tests/gpu/test_tuned_gemm_cuda.py
            do_run python3 -m pytest -q tests/gpu/test_backends_cuda.py
            # Kernels compile in as many processes as xdist, where it is installed, may start.
            do_run python3 -m pytest -q ${PYTEST_WORKERS:+-n "$PYTEST_WORKERS"} \
                tests/kernels/test_triton_{norm,activation,argmax,sampling,skinny_gemm,gemv,invariant_gemm,rotary}.py \
                tests/kernels/test_{verify,mixed,draft}_step.py
            ;;
        kernels)
            do_run python3 -m experiments.gpu_fused --out "$OUT/fused.jsonl"
            do_run python3 -m experiments.gpu_gemv --out "$OUT/gemv.jsonl"
            do_run python3 -m experiments.gpu_launch
            do_run python3 -m experiments.gpu_linear --chain --rows 1,16 --out "$OUT/linear.jsonl"
            ;;
        peak)
            do_run python3 -m experiments.peak results_dir="$OUT"
            ;;
        ablation)
            for model in llama-3.1-8b qwen3-0.6b; do
                do_run python3 -m experiments.gpu_ablation model="$model" results_dir="$OUT"
            done
            ;;
        sanitize)
            # Without torch's caching of memory, so that an access beyond a tensor is one beyond an allocation.
            for tool in memcheck racecheck; do
                do_run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    python3 -m pytest -q -x -p no:cacheprovider -k "dtype1 or cut or gates or step" \
                    tests/kernels/test_triton_{norm,activation,argmax,sampling,skinny_gemm,gemv,rotary}.py \
                    tests/kernels/test_{verify,mixed,draft}_step.py
            done
            ;;
        cascade)
            do_run python3 -m experiments.gpu_attention --only "8 x 32" --out "$OUT/cascade.jsonl"
            do_run python3 -m experiments.peak preset=gpu_cascade workloads=shared_prefix results_dir="$OUT"
            for model in qwen3-0.6b llama-3.1-8b; do
                do_run python3 -m experiments.gpu_timeline preset=gpu_cascade model="$model" requests=256 \
                    context=2176 shared=2048 groups=8
            done
            ;;
        timeline)
            for model in qwen3-0.6b llama-3.1-8b; do
                do_run python3 -m experiments.gpu_timeline model="$model"
            done
            ;;
        *)
            echo "no part '$name': checks, kernels, sanitize, peak, cascade, ablation or timeline" >&2
            exit 2
            ;;
        esac
    done
done
exit "$status"
