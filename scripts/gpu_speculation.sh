#!/usr/bin/env bash
# Speculation on one GPU: checks, when drafts pay, and heads trained for a model.
#
#   OUT=results/local/gpu scripts/gpu_speculation.sh [checks] [map] [train]
#
# `train` needs MODEL (a model folder or file); KINDS are eagle3 unless given, MINUTES 9.5. The model
# makes up the prompts itself.
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
                    batch_sizes=1,4,16,64,256 draft_lengths=3,5 acceptance_lengths=2.0,3.5 num_steps=96 \
                    engine.kv_cache.block_size=64 engine.graph_runner.max_verify_tokens=384 \
                    "results_dir=$OUT"
            done
            ;;
        train)
            for kind in ${KINDS:-eagle3}; do
                do_run python3 -m workbench train_head "kind=$kind" "model=${MODEL:?a model folder}" \
                    engine/platform=cuda "+technique=[$gpu_techniques,overlap]" num_own_prompts=12000 \
                    training.samples_per_prompt=2 training.held_out_fraction=0.01 training.epochs=20 \
                    training.batch_tokens=8192 training.kept_states_gib=40 \
                    limits.max_num_seqs=512 limits.max_model_len=768 "max_minutes=${MINUTES:-9.5}" \
                    "out=$OUT/$kind"
            done
            ;;
        *)
            echo "no part is called $part: there are checks, map, train" >&2
            failed=1
            ;;
    esac
done
exit "$failed"
