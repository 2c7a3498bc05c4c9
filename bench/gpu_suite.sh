#!/usr/bin/env bash
# All that a GPU can tell about a commit, in under 9 minutes: the laws of the kernels and tests/gpu, the sanitizer over
# the row kernel, and every op beside its peers.
#   bash bench/gpu_suite.sh --out DIR [--wheels DIR]  # PYTHON=... picks an interpreter with fastppo installed, else python3
# A part that fails does not stop the next; the exit status is 1 if any did. Needs pytest and hypothesis. Where there is no
# network, put wheels of what is missing into a folder first (the peers are optional; a missing one is a row that says so):
#   pip download --no-deps -d wheels hypothesis sortedcontainers tyro docstring-parser typeguard liger-kernel trl
set -uo pipefail
usage="usage: bash bench/gpu_suite.sh --out DIR [--wheels DIR]"
[[ ${1:-} == --out && -n ${2:-} && ($# == 2 || ($# == 4 && $3 == --wheels)) ]] || { echo "$usage" >&2; exit 2; }
export PYTHON=${PYTHON:-python3}
[[ $# == 2 ]] || "$PYTHON" -m pip install -q --no-index --no-deps "$4"/*.whl || exit 2
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET FASTPPO_BACKEND # on a GPU the kernels are compiled
failed=0

part() { # name, seconds it may take, command...
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$1"
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || { echo "$1 FAILED"; failed=1; }
}

beside() { # name, command...: into a log of its own, beside the other jobs
    "${@:2}" >"$out/$1.log" 2>&1 &
    jobs+=("$!:$1")
}

laws() { # name, arguments of pytest...
    beside "$1" "$PYTHON" -m pytest "${@:2}" -q -W default -p no:cacheprovider --junitxml "$out/$1.xml"
}

tests() { # in several processes: nearly all of the time is spent compiling, on one core each
    local job status=0 jobs=()
    beside sanitized "$PYTHON" bench/sanitized_rows.py # compiles, so that the sanitizer need not
    laws gpu tests/gpu/test_on_gpu.py
    laws kernels_on_gpu tests/gpu/test_kernels_on_gpu.py
    laws rows_table tests/test_gpu_rows.py -k "table_and_gradient"
    laws rows_tokens tests/test_gpu_rows.py -k "tokens_answer or far_and_near"
    laws rows tests/test_gpu_rows.py -k "not table_and_gradient and not tokens_answer and not far_and_near"
    laws sampling tests/test_gpu_sampling.py
    laws sequences tests/test_gpu_sequences.py
    laws values tests/test_gpu_values.py
    for job in "${jobs[@]}"; do
        wait "${job%%:*}" || { status=1; echo "${job#*:} FAILED"; }
        grep -E "^(FAILED|ERROR) " "$out/${job#*:}.log" | cut -c 1-200
        echo "${job#*:}: $(tail -n 1 "$out/${job#*:}.log")"
    done
    return $status
}

sanitizer() { # reads and writes out of bounds; then threads that race for shared memory
    local tool check
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [[ -n $tool ]] || { echo "skipped: there is no compute-sanitizer here; it comes with the CUDA toolkit"; return 0; }
    for check in memcheck racecheck; do
        "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" bench/sanitized_rows.py || return 1
    done
}
export -f beside laws tests sanitizer
export out

"$PYTHON" -c "from fastppo.doctor import doctor; doctor()" | tee "$out/doctor.txt"
part tests 190 bash -c tests
PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer 70 bash -c sanitizer
part rollout 60 "$PYTHON" bench/bench_rollout.py --device cuda --models 0.5B --dtypes bfloat16 --out "$out/rollout.jsonl"
part kernels 200 bash bench/kernels.sh "$out/kernels.jsonl" --seconds 2
exit $failed
