#!/usr/bin/env bash
# The whole way of this project on two CPU cores: text, swap and uptraining, measurements, report, export.
# Every line is a command that works the same on real data and 256 GPUs; only the sizes differ.
set -euo pipefail
cd "$(dirname "$0")/.."
work=.cache/demo
run=logs/demo
rm -rf "$run" "${run}_supra"

echo "== 1. Text: the documentation and docstrings that every Python installation carries"
python -m open_lm_linear.data.python_docs --output "$work/docs.jsonl.gz"
python -m open_lm_linear.data.prepare --input "$work/docs.jsonl.gz" --tokenizer smollm2 --seq-len 256 \
    --output "$work/data" --overwrite

echo "== 2. Swap the attention of SmolLM2-135M, align it with the softmax layers, distil: configs/runs/demo.yaml"
torchrun --nproc-per-node 1 -m open_lm_linear.main --config configs/runs/demo.yaml

echo "== 3. The paper's recipe on the same text, for comparison: configs/runs/demo_supra.yaml"
torchrun --nproc-per-node 1 -m open_lm_linear.main --config configs/runs/demo_supra.yaml

echo "== 4. Measure teacher, swapped and trained; write the report"
python -m open_lm_linear.evaluate --run "$run" --beside "${run}_supra"

echo "== 5. Hand over a Hugging Face folder"
python -m open_lm_linear.export "$run" "$run/hf" --dtype float32
echo "done: report in $run/report.md, model in $run/hf"
