#!/usr/bin/env bash
# Every op beside its peers, on this machine, one JSON line per variant:
#   bash bench/kernels.sh FILE [options of the scripts, e.g. --seconds 5 --only "torch eager"]
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:?usage: bash bench/kernels.sh FILE [options]}
shift
python=${PYTHON:-.venv/bin/python}
for op in logits_ppo_loss linear_ppo_loss token_logprobs value gae sample; do
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$op"
    "$python" "bench/bench_$op.py" --out "$file" "$@"
done
