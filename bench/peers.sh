#!/usr/bin/env bash
# A virtual environment for each peer, with pinned versions and this fastppo beside it:
#   bash bench/peers.sh DIR [NAME ...]     # all of: kernels trl-ppo verl openrlhf agilerl
# DIR/NAME/bin/python runs `-m fastppo bench kernels`; DIR/NAME.txt has the versions, or why there is no such environment.
# PYTHON picks the interpreter. torch comes from its own index by what the machine has; --no-deps where a peer pins
# packages of another torch: what it then lacks at import is a row of the benchmark that says so.
set -uo pipefail
dir=${1:?usage: bash bench/peers.sh DIR [kernels trl-ppo verl openrlhf agilerl]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
names=("$@")
[[ $# -gt 0 ]] || names=(kernels trl-ppo verl openrlhf agilerl)

into() { "$dir/$name/bin/python" -m pip install -q --disable-pip-version-check "$@" >>"$dir/$name.log" 2>&1; }

peer() { # what each environment holds beside torch and fastppo
    case $name in
        kernels) into liger-kernel==0.8.5 trl==1.16.0 "pytest-benchmark>=5" ;;
        trl-ppo) into trl==1.12.0 "accelerate>=1.15" "datasets>=4.7" ;;
        verl) into tensordict==0.10.0 omegaconf==2.3.1 hydra-core==1.3.2 "ray==2.55.0" codetiming peft torchdata pandas pyarrow dill &&
            into --no-deps verl==0.9.1 ;;
        openrlhf) into deepspeed==0.19.6 peft einops ray==2.55.0 optree loralib && into --no-deps openrlhf==0.11.2 ;;
        agilerl) into liger-kernel==0.8.5 peft==0.21.0 agilerl==2.58.0 ;;
        *) echo "no peer $name" >>"$dir/$name.log"; return 1 ;;
    esac
}

check() { # the module that the benchmark imports
    case $name in
        kernels) echo "import liger_kernel.chunked_loss, trl.trainer.utils" ;;
        trl-ppo) echo "import trl.experimental.ppo" ;;
        verl) echo "import verl.trainer.ppo.core_algos, verl.utils.experimental.torch_functional" ;;
        openrlhf) echo "import openrlhf.models.loss" ;;
        agilerl) echo "import agilerl.algorithms.core.llm_ops.fused_loss" ;;
    esac
}

status=0
for name in "${names[@]}"; do
    : >"$dir/$name.log"
    [[ -x $dir/$name/bin/python ]] || "${PYTHON:-python3}" -m venv "$dir/$name" || exit 2
    if into -c "$root/constraints.txt" torch && into -c "$root/constraints.txt" "$root" && peer &&
        "$dir/$name/bin/python" -c "$(check)" >>"$dir/$name.log" 2>&1; then
        "$dir/$name/bin/python" -m pip freeze --disable-pip-version-check >"$dir/$name.txt"
        echo "$name: ready"
    else
        { echo "not available:"; grep -E "ERROR|Error" "$dir/$name.log" | tail -n 3; } | tee "$dir/$name.txt" | sed "s/^/$name: /"
        status=1
    fi
done
exit $status
