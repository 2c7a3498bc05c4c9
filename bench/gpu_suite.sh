#!/usr/bin/env bash
# All that a GPU can tell about a commit, in under 9 minutes: tests/gpu, then every op beside its peers.
#   bash bench/gpu_suite.sh --out DIR      # PYTHON=... picks an interpreter with fastppo installed, else python3
# A part that fails does not stop the next; the exit status is 1 if any did.
set -uo pipefail
[[ ${1:-} == --out && -n ${2:-} ]] || { echo "usage: bash bench/gpu_suite.sh --out DIR" >&2; exit 2; }
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
failed=0

part() { # name, seconds it may take, command...
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$1"
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || { echo "$1 FAILED"; failed=1; }
}

"$PYTHON" -c "from fastppo.doctor import doctor; doctor()" | tee "$out/doctor.txt"
part tests 200 "$PYTHON" -m pytest tests/gpu -q -W default --junitxml "$out/tests.xml"
part kernels 320 bash bench/kernels.sh "$out/kernels.jsonl" --seconds 2
exit $failed
