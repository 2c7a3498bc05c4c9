#!/usr/bin/env bash
# Every op beside its peers, on this machine, one JSON line per variant, an op to a process:
#   bash bench/kernels.sh FILE [options of the ops, e.g. --seconds 5 --only "torch eager"]
# PYTHON picks the interpreter. With PEERS, a folder that bench/peers.sh filled, the peers that need an environment of
# their own are timed there, beside fastppo in the same process.
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:?usage: bash bench/kernels.sh FILE [options]}
shift
python=${PYTHON:-.venv/bin/python}
ops=$("$python" -c 'from fastppo.bench.ops import OPS; print(*OPS)')
for op in $ops; do
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$op"
    "$python" -m fastppo bench kernels --ops "$op" --out "$file" "$@"
done
[[ -n ${PEERS:-} ]] || exit 0
for peer in verl openrlhf agilerl; do
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$peer"
    if [[ ! -x $PEERS/$peer/bin/python ]]; then
        echo "no environment for $peer: bash bench/peers.sh $PEERS $peer"
        continue
    fi
    case $peer in
        verl) ops=(linear_ppo_loss token_logprobs ppo_loss gae) only=("verl FusedLinearForPPO" "verl kernel" "verl 0.9.1") ;;
        openrlhf) ops=(ppo_loss) only=(OpenRLHF) ;;
        agilerl) ops=(linear_ppo_loss) only=("AgileRL fused") ;;
    esac
    "$PEERS/$peer/bin/python" -m fastppo bench kernels --ops "${ops[@]}" --out "$file" "$@" --only "${only[@]}"
done
