#!/usr/bin/env bash
# Checks and measures the fast path on one CUDA device: captured steps, overlap, fused kernels, products of few rows.
# usage: WORKBENCH_COMMIT=$(git rev-parse HEAD) OUT=folder scripts/gpu_fast_path.sh [checks|kernels|peak|timeline]...
# Without a part, all of them. Records go to $OUT; every part runs whether or not the one before it failed, and the exit
# status is that of the last one that did.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the records}"
export PYTHONPATH=".:${PYTHONPATH:-}"
status=0
do_run() { echo "== $*"; local start=$SECONDS; "$@" || status=$?; echo "-- $((SECONDS - start)) s, status $status"; }

for part in "${@:-checks kernels peak timeline}"; do
    for name in $part; do
        case $name in
        checks)
            do_run python3 tests/gpu/test_fast_path_cuda.py
            do_run python3 tests/gpu/test_memory_cuda.py
            do_run python3 -m pytest -q tests/gpu/test_backends_cuda.py
            # Kernels compile in as many processes as xdist, where it is installed, may start.
            do_run python3 -m pytest -q ${PYTEST_WORKERS:+-n "$PYTEST_WORKERS"} \
                tests/kernels/test_triton_{norm,activation,argmax,sampling,skinny_gemm,rotary}.py
            ;;
        kernels)
            do_run python3 -m experiments.gpu_fused --out "$OUT/fused.jsonl"
            do_run python3 -m experiments.gpu_linear --chain --rows 1,16 --out "$OUT/linear.jsonl"
            ;;
        peak)
            do_run python3 -m experiments.peak results_dir="$OUT"
            ;;
        timeline)
            for model in qwen3-0.6b llama-3.1-8b; do
                do_run python3 -m experiments.gpu_timeline model="$model"
            done
            ;;
        *)
            echo "no part '$name': checks, kernels, peak or timeline" >&2
            exit 2
            ;;
        esac
    done
done
exit "$status"
