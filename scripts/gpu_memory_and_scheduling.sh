#!/usr/bin/env bash
# Checks and measures on one CUDA device what memory and scheduling promise: attention kernels and
# libraries, copies of the host tier, prefix caches and their price where nothing is found.
# usage: WORKBENCH_COMMIT=$(git rev-parse HEAD) OUT=folder scripts/gpu_memory_and_scheduling.sh [kernels|engine]
# Records and figures go to $OUT. Every part runs whether or not the one before it failed; the exit
# status is that of the last one that did.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the records}"
part=${1:-all}
status=0
do_run() { echo "== $*"; local start=$SECONDS; "$@" || status=$?; echo "-- $((SECONDS - start)) s, status $status"; }

if [[ $part == all || $part == kernels ]]; then
    do_run env PYTHONPATH=".:${PYTHONPATH:-}" python3 tests/gpu/test_host_pool_cuda.py
    do_run python3 -m experiments.gpu_attention --out "$OUT/attention.jsonl"
    do_run python3 -m experiments.gpu_prefill --out "$OUT/prefill.jsonl"
fi
if [[ $part == all || $part == engine ]]; then
    big=(engine/platform=cuda engine/attention=auto model=llama-3.1-8b weights=random results_dir="$OUT")
    do_run python3 -m workbench +technique=host_offload engine/platform=cuda model=qwen3-0.6b weights=random \
        bench.reference=hf_scored "baselines=[]" results_dir="$OUT"
    # What a cache costs where it finds nothing, and what it gains at 75 %.
    do_run python3 -m experiments.prefix_hit_rate "${big[@]}" workload=prefix_hits workload.num_requests=64 \
        workload.output_len=16 limits.max_num_seqs=64 bench.reference=hf_scored bench.residency=one bench.rounds=7 \
        rates=0,0.75
    # Warmed up with the whole load, so that no round compiles a kernel.
    do_run python3 -m workbench +experiment=gpu_shared_prefix +technique=radix_cache bench.warmup=256 \
        results_dir="$OUT"
fi
exit "$status"
