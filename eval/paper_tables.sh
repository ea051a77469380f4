#!/usr/bin/env bash
# The paper's Tables 1 and 2 for a teacher and what was uptrained from it, beside the published figures.
#     TEACHER=mistral-7b=mistral STUDENT=mistral-supra-20b=logs/mistral_7b_supra_20b bash eval/paper_tables.sh
# A model's name before the = is the published row that it is compared with. Words after the script's name are more flags
# of the evaluation: --include-path TASKS --limit 8 for a try offline. An interrupted evaluation goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TEACHER:=mistral-7b=mistral}"
: "${STUDENT:=mistral-supra-20b=logs/mistral_7b_supra_20b}"
: "${OUT:=evaluations}"

for table in paper_table1 paper_table2; do
    python -m open_lm_linear.evaluate --models "$TEACHER" "$STUDENT" --suite "$table" --out "$OUT/$table" "$@"
done
