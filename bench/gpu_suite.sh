#!/usr/bin/env bash
# All that a GPU can tell about a commit, in under 9 minutes: the laws of the kernels and tests/gpu, every op beside its
# peers, an iteration by phase on the shapes that fit, bitwise repeats, the sanitizer over the row kernel, memory planned
# against measured, sampling.
#   bash bench/gpu_suite.sh [--out DIR] [--wheels DIR] [--rehearse]
# --out (bench/results): DEVICE-*.jsonl, and logs in suite-DEVICE/. A part that is done is not run again, nor is a
# measurement that DEVICE-*.jsonl has: the same command goes on where the last one stopped; remove both to start over. A part that fails does not stop the next; the
# exit status is 1 if any did. PYTHON=... picks an interpreter with fastppo, pytest and hypothesis. No network is used:
# --wheels installs what is missing from a folder (the peers are optional; a missing one is a row that says so):
#   pip download --no-deps -d wheels hypothesis sortedcontainers tyro docstring-parser typeguard liger-kernel trl
# --rehearse: the same parts on a CPU at tiny sizes, to see that they run; without the time budgets, which are a GPU's.
set -uo pipefail
usage="usage: bash bench/gpu_suite.sh [--out DIR] [--wheels DIR] [--rehearse]"
out=$(dirname "$0")/results wheels="" rehearse=""
while [[ $# -gt 0 ]]; do
    case $1 in
        --rehearse) rehearse=yes && shift ;;
        --out | --wheels) [[ -n ${2:-} ]] || { echo "$usage" >&2; exit 2; }
            [[ $1 == --out ]] && out=$2 || wheels=$2
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
    slug=rehearsal quick=(--device cpu --quick --threads 1) models=() ops=(--dtypes float32 --entropy False)
else
    slug=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))') ||
        { echo "no GPU: bash bench/gpu_suite.sh --rehearse runs the parts on a CPU" >&2; exit 2; }
    quick=(--device cuda) models=(--models 0.5B) ops=()
fi
export logs=$out/suite-$slug rehearse
mkdir -p "$logs"
failed=0

part() { # name, seconds it may take, command...
    if [[ -e $logs/$1.done ]]; then
        echo "=== $1: done before"
        return
    fi
    printf '\n=== [%4d s] %s\n' "$SECONDS" "$1"
    timeout "$([[ -n $rehearse ]] && echo 0 || echo "$2")" "${@:3}" 2>&1 | tee "$logs/$1.log" && touch "$logs/$1.done" || { echo "$1 FAILED"; failed=1; }
}

beside() { # name, command...: into a log of its own, beside the other jobs
    "${@:2}" >"$logs/$1.log" 2>&1 &
    jobs+=("$!:$1")
}

laws() { # name, arguments of pytest...
    beside "$1" "$PYTHON" -m pytest "${@:2}" -q -W default -p no:cacheprovider --junitxml "$logs/$1.xml"
}

tests() { # in several processes: nearly all of the time is spent compiling, on one core each
    local job status=0 jobs=()
    laws gpu tests/gpu/test_on_gpu.py -k "not hundred"
    if [[ -z $rehearse ]]; then
        beside sanitized "$PYTHON" bench/sanitized_rows.py # compiles, so that the sanitizer need not
        laws kernels_on_gpu tests/gpu/test_kernels_on_gpu.py
        laws engine_on_gpu tests/gpu/test_{memory,plan,offload,resume}_on_gpu.py
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
        grep -E "^(FAILED|ERROR) " "$logs/${job#*:}.log" | cut -c 1-200
        echo "${job#*:}: $(tail -n 1 "$logs/${job#*:}.log")"
    done
    return $status
}

sanitizer() { # reads and writes out of bounds; then threads that race for shared memory
    local tool check
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [[ -n $tool ]] || { echo "skipped: there is no compute-sanitizer here; it comes with the CUDA toolkit"; return 0; }
    [[ -z $rehearse ]] || { echo "skipped: a rehearsal has no GPU"; return 0; }
    for check in memcheck racecheck; do
        "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" bench/sanitized_rows.py || return 1
    done
}

memory() { # whether six runs fit, above and below what they take: the planner and the allocator
    [[ -f bench/bench_memory.py ]] || { echo "skipped: this commit has no memory planner"; return 0; }
    "$PYTHON" bench/bench_memory.py verdict --device "$([[ -n $rehearse ]] && echo cpu || echo cuda)" \
        --out "$logs/memory.jsonl" --only full "full, vocabulary 20000" "full, checkpointing" \
        "full, bfloat16, one micro-batch" "full, tied embeddings" "full, selective"
}
export -f beside laws tests sanitizer memory

"$PYTHON" -c "from fastppo.doctor import doctor; doctor()" | tee "$logs/doctor.txt"
part tests 170 bash -c tests
part kernels 150 "$PYTHON" -m fastppo bench kernels --go-on "${quick[@]}" "${ops[@]}" --seconds 1 --out "$out/$slug-kernels.jsonl"
part step 75 "$PYTHON" -m fastppo bench step --go-on "${quick[@]}" --rounds 3 --out "$out/$slug-step.jsonl"
part determinism 25 "$PYTHON" -m pytest tests/gpu -q -W default -p no:cacheprovider -k hundred
PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer 60 bash -c sanitizer
part memory 24 bash -c memory
part rollout 35 "$PYTHON" -m fastppo bench rollout --go-on "${quick[@]}" "${models[@]}" --seconds 2 --out "$out/$slug-rollout.jsonl"
printf '\n[%4d s] %s\n' "$SECONDS" "$([[ $failed == 0 ]] && echo "all parts ran" || echo "see $logs")"
exit $failed
