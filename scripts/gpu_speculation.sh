#!/usr/bin/env bash
# Speculation on one GPU: checks, when drafts pay, and heads trained for a model.
#
#   OUT=results/local/gpu scripts/gpu_speculation.sh [checks] [map] [train]
#
# `train` needs MODEL (a model folder) and DATA (files of prompts, commas between them).
# Every part runs whatever became of the others; the exit status is 1 if one failed.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="${PYTHONPATH:-.}" PYTHONUNBUFFERED=1
OUT="${OUT:-results/local/gpu}"
mkdir -p "$OUT"
failed=0
do_run() {
    echo "--- $*"
    "$@" || failed=1
}
gpu_techniques=continuous_batching,paged_attention,triton_attention,cuda_graphs,fused_kernels,skinny_gemm
[ $# -gt 0 ] || set -- checks map
for part in "$@"; do
    case "$part" in
        checks)
            do_run python3 tests/gpu/test_speculation_cuda.py
            ;;
        map)
            for drafter in synthetic eagle; do
                do_run python3 -m experiments.break_even "drafter=$drafter" model=llama-3.1-8b weights=random \
                    engine/platform=cuda dtype=bfloat16 "techniques=$gpu_techniques" base_techniques=overlap \
                    batch_sizes=1,4,16,64,256 draft_lengths=3,5 acceptance_lengths=2.0,3.5 \
                    engine.kv_cache.block_size=64 "results_dir=$OUT"
            done
            ;;
        train)
            for kind in eagle3 medusa; do
                do_run python3 -m workbench train_head "kind=$kind" preset=gpu "model=${MODEL:?a model folder}" \
                    "data=[${DATA:?files of prompts}]" limits.max_num_seqs=256 limits.max_model_len=1024 \
                    max_minutes=8.5 "out=$OUT/$kind"
            done
            ;;
        *)
            echo "no part is called $part: there are checks, map, train" >&2
            failed=1
            ;;
    esac
done
exit "$failed"
