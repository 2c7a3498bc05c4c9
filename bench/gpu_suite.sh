#!/usr/bin/env bash
# All that a GPU can tell about a commit, in under 9 minutes: the laws of the kernels and tests/gpu, every op beside its
# peers, an iteration by phase on the shapes that fit, bitwise repeats, the sanitizer over the row kernel, memory planned
# against measured, sampling.
#   bash bench/gpu_suite.sh [--out DIR] [--wheels DIR] [--commit NAME] [--rehearse]
# --out (bench/results): DEVICE-*.jsonl, and what was printed in suite-DEVICE/. What this commit has done is not run
# again, neither a part nor a measurement: the same command goes on where the last one stopped. A part that fails or
# runs out of its seconds does not stop the next; the exit status is 1 if any did, or if there is no compute-sanitizer.
# PYTHON=... picks an interpreter with fastppo, pytest and hypothesis; --commit says what a copy without git is of. No
# network is used: --wheels installs what is missing from a folder (a peer that is missing is a row that says so):
#   pip download --no-deps -d wheels hypothesis sortedcontainers tyro docstring-parser typeguard liger-kernel==0.8.5 trl==1.16.0
# --rehearse: the same parts on a CPU at tiny sizes, to see that they run; without the time budgets, which are a GPU's.
set -uo pipefail
usage="usage: bash bench/gpu_suite.sh [--out DIR] [--wheels DIR] [--commit NAME] [--rehearse]"
out=$(dirname "$0")/results wheels="" commit="" rehearse=""
while [[ $# -gt 0 ]]; do
    case $1 in
        --rehearse) rehearse=yes && shift ;;
        --out | --wheels | --commit) [[ -n ${2:-} ]] || { echo "$usage" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
done
export PYTHON=${PYTHON:-python3}
[[ $PYTHON != */* ]] || PYTHON=$(realpath -s "$PYTHON")
[[ -z $wheels ]] || "$PYTHON" -m pip install -q --no-index --no-deps "$wheels"/*.whl || exit 2
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET FASTPPO_BACKEND # on a GPU the kernels are compiled
if [[ -n $rehearse ]]; then
    slug=rehearsal quick=(--device cpu --quick --threads 1) models=() ops=(--dtypes float32) shapes=()
else
    slug=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))') ||
        { echo "no GPU: bash bench/gpu_suite.sh --rehearse runs the parts on a CPU" >&2; exit 2; }
    # bfloat16 alone, which GPUs train in: a float32 head of 26 TFLOP takes half a second per call of each of nine variants
    quick=(--device cuda) models=(--models 0.5B) ops=(--dtypes bfloat16) shapes=(--prompts 32)
fi
# what a part that is done was run with; a copy without git and without --commit has no name, and does all again
code=$("$PYTHON" -c 'import sys; from fastppo.bench.machine import commit_of, versions; print(sys.argv[1] or commit_of(), versions())' "$commit") || exit 2
quick+=(--go-on ${commit:+--commit "$commit"})
export logs=$out/suite-$slug own rehearse
own=$(mktemp -d) # a log for each job; log.txt gets all of them
trap 'rm -rf "$own"' EXIT
mkdir -p "$logs"
touch "$logs/done"
failed=0

part() { # name, seconds it may take, command...
    if [[ $code != unknown* ]] && grep -qxF "$code $1" "$logs/done"; then
        echo "=== $1: done before"
        return
    fi
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$1"
    timeout "$([[ -n $rehearse ]] && echo 0 || echo "$2")" "${@:3}" 2>&1 | tee "$own/$1.log" &&
        echo "$code $1" >>"$logs/done" || { echo "$1 FAILED"; failed=1; }
    printf '\n=== %s\n' "$1" | cat - "$own/$1.log" >>"$logs/log.txt"
}

beside() { # name, command...: into a log of its own, beside the other jobs
    "${@:2}" >"$own/$1.log" 2>&1 &
    jobs+=("$!:$1")
}

laws() { # name, arguments of pytest...
    beside "$1" "$PYTHON" -m pytest "${@:2}" -q -W default -p no:cacheprovider
}

tests() { # in several processes: nearly all of the time is spent compiling, on one core each
    local job status=0
    jobs=()
    trap 'for job in "${jobs[@]}"; do printf "\n=== %s\n" "${job#*:}"; cat "$own/${job#*:}.log"; done >>"$logs/log.txt"' EXIT
    laws gpu tests/gpu/test_on_gpu.py -k "not hundred"
    if [[ -z $rehearse ]]; then
        beside sanitized "$PYTHON" bench/sanitized_rows.py # compiles, so that the sanitizer need not
        laws kernels_on_gpu tests/gpu/test_kernels_on_gpu.py
        laws engine_on_gpu tests/gpu/test_{memory,plan,offload,resume,saving}_on_gpu.py
        laws scale tests/test_ops_scale.py
        laws rows_table tests/test_gpu_rows.py -k "table_and_gradient"
        laws rows_tokens tests/test_gpu_rows.py -k "tokens_answer or far_and_near"
        laws rows tests/test_gpu_rows.py -k "not table_and_gradient and not tokens_answer and not far_and_near"
        laws sampling tests/test_gpu_sampling.py
        laws decode tests/test_ops_decode.py
        laws sequences tests/test_gpu_sequences.py
        laws values tests/test_gpu_values.py
    fi
    for job in "${jobs[@]}"; do
        wait "${job%%:*}" || { status=1; echo "${job#*:} FAILED"; }
        grep -E "^(FAILED|ERROR) " "$own/${job#*:}.log" | cut -c 1-200
        echo "${job#*:}: $(tail -n 1 "$own/${job#*:}.log")"
    done
    return $status
}

sanitizer() { # reads and writes out of bounds; then threads that race for shared memory
    local tool check
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [[ -z $rehearse ]] || { echo "skipped: a rehearsal has no GPU"; return 0; }
    [[ -n $tool ]] || { echo "there is no compute-sanitizer here; it comes with the CUDA toolkit"; return 1; }
    for check in memcheck racecheck; do
        "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" bench/sanitized_rows.py || return 1
    done
}

memory() { # whether six runs fit, above and below what they take: the planner and the allocator
    "$PYTHON" bench/bench_memory.py verdict --device "$([[ -n $rehearse ]] && echo cpu || echo cuda)" \
        --out "$logs/memory.jsonl" --only full "full, vocabulary 20000" "full, checkpointing" \
        "full, bfloat16, one micro-batch" "full, tied embeddings" "full, selective"
}
export -f beside laws tests sanitizer memory

"$PYTHON" -c "from fastppo.doctor import doctor; doctor()" | tee -a "$logs/log.txt"
part tests 160 bash -c tests
part kernels 160 "$PYTHON" -m fastppo bench kernels "${quick[@]}" "${ops[@]}" --entropy False --seconds 1 --out "$out/$slug-kernels.jsonl"
part step 70 "$PYTHON" -m fastppo bench step "${quick[@]}" "${shapes[@]}" --rounds 2 --out "$out/$slug-step.jsonl"
part determinism 35 "$PYTHON" -m pytest tests/gpu -q -W default -p no:cacheprovider -k hundred
PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer 45 bash -c sanitizer
part memory 20 bash -c memory
part rollout 30 "$PYTHON" -m fastppo bench rollout "${quick[@]}" "${models[@]}" --repeats 3 --seconds 1 --out "$out/$slug-rollout.jsonl"
printf '\n[%4d s] %s\n' "$SECONDS" "$([[ $failed == 0 ]] && echo "all parts ran" || echo "see $logs")"
exit $failed
