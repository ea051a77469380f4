#!/usr/bin/env bash
# The 1B uptraining in two steps: first the feature maps alone, then every weight from where they ended.
#     DATA=DATA/neox bash training/two_step.sh
# Needs the softmax model (pretrain_1b.sh), or another one as TEACHER. Words after the script's name go to both steps.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${DATA:=DATA/neox}"                             # the folder that open_lm_linear.data.prepare wrote
: "${TEACHER:=logs/open_lm_1b_softmax_100b}"       # anything that --pretrained takes
: "${STEP1:=open_lm_1b_two_step_1}"
: "${STEP2:=open_lm_1b_two_step_2}"
: "${GPUS:=8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"              # else every process takes all cores
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True     # less memory lost to fragments

# A script that was stopped goes on where it was: a step that is done says so and ends at once.
step() { # recipe, weights to start from, more flags
    torchrun --standalone --nproc-per-node "$GPUS" -m open_lm_linear.main --config "$1" --name "$1" --pretrained "$2" \
        --train-data "$DATA/train/manifest.jsonl" --val-data "$DATA/val/manifest.jsonl" --resume latest "${@:3}"
}
step "$STEP1" "$TEACHER" "$@"
step "$STEP2" "logs/$STEP1" "$@"
