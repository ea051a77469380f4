#!/usr/bin/env bash
# A 1B model from scratch on one machine with 8 GPUs. The softmax one is the teacher of the 1B uptrainings.
#     TEXT='/data/refinedweb/*.jsonl.zst' bash training/pretrain_1b.sh
#     RECIPE=linear_1b_scratch_100b bash training/pretrain_1b.sh
# Words after the script's name are more flags of the training; --dry-run says first what it would take.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TEXT:=text/*.jsonl.zst}"                   # .txt or .jsonl, plain or compressed
: "${DATA:=DATA/neox}"                          # where the shards go
: "${TOKENIZER:=EleutherAI/gpt-neox-20b}"       # OpenLM's; the 1B models have its vocabulary
: "${RECIPE:=open_lm_1b_softmax_100b}"
: "${GPUS:=8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"              # else every process takes all cores
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True     # less memory lost to fragments

if [[ ! -e $DATA/train/manifest.jsonl ]]; then
    python -m open_lm_linear.data.prepare --input "$TEXT" --tokenizer "$TOKENIZER" --seq-len 2048 --output "$DATA"
fi
torchrun --standalone --nproc-per-node "$GPUS" -m open_lm_linear.main --config "$RECIPE" \
    --train-data "$DATA/train/manifest.jsonl" --val-data "$DATA/val/manifest.jsonl" --resume latest "$@"
