#!/usr/bin/env bash
# Mistral-7B to a linear RNN on one machine with 8 GPUs: text, uptraining, measurements, export.
#     TEXT='/data/refinedweb/*.jsonl.zst' bash training/uptrain_mistral.sh
# Words after the script's name are more flags of the training; --dry-run says first what it would take.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TEXT:=text/*.jsonl.zst}"          # .txt or .jsonl, plain or compressed
: "${DATA:=DATA/mistral}"              # where the shards go
: "${RECIPE:=mistral_7b_supra_20b}"    # 100B: mistral_7b_supra_100b and --pretrained mistral --attn-name linear
: "${NAME:=$RECIPE}"
: "${GPUS:=8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"              # else every process takes all cores
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True     # less memory lost to fragments

if [[ ! -e $DATA/train/manifest.jsonl ]]; then
    python -m open_lm_linear.data.prepare --input "$TEXT" --tokenizer mistral --seq-len 2048 --output "$DATA"
fi
torchrun --standalone --nproc-per-node "$GPUS" -m open_lm_linear.main --config "$RECIPE" --name "$NAME" \
    --train-data "$DATA/train/manifest.jsonl" --val-data "$DATA/val/manifest.jsonl" --resume latest "$@"
[[ " $* " == *" --dry-run "* ]] && exit

python -m open_lm_linear.evaluate --run "logs/$NAME"
python -m open_lm_linear.export "logs/$NAME" "logs/$NAME/hf" --dtype bfloat16 --overwrite
