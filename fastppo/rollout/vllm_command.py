"""How a vLLM server for fastppo is started."""

import shlex
from pathlib import Path

WORKER = Path(__file__).parent / "server"  # on PYTHONPATH of the server; nothing else of fastppo is


def start_command(
    model: str,
    *,
    python: str = "python",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "float32",
    max_model_len: int | None = None,
    cpu: bool = False,
    sleep: bool = False,
) -> tuple[dict[str, str], list[str]]:
    """Environment variables and arguments of one server.

    Args:
        model: checkpoint whose config and tokenizer it takes. Its weights are not read: the server begins with random
            ones and gets the policy's before it is asked, so that one that did not get all of them shows at once.
        python: of the environment that vLLM is installed in.
        dtype: the policy's.
        max_model_len: tokens of the longest prompt and response; None: the model's context.
        cpu: eager, with 1 GiB for keys and values.
        sleep: for rollout.vllm.sleep, when server and trainer share a card.
    """
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(WORKER)}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"} if cpu else {}
    arguments = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "policy"]
    arguments += ["--host", host, "--port", str(port), "--dtype", dtype, "--load-format", "dummy"]
    arguments += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    arguments += ["--worker-extension-cls", "fastppo_worker.Extension"]
    arguments += ["--weight-transfer-config", '{"backend": "fastppo"}']
    arguments += [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    arguments += ["--enforce-eager"] if cpu else []
    arguments += ["--enable-sleep-mode", "--gpu-memory-utilization", "0.5"] if sleep else []
    return environment, arguments


def shell(environment: dict[str, str], arguments: list[str]) -> str:
    """The same as a line for a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(arguments)])


def described() -> list[str]:
    """What `fastppo doctor` prints."""
    variants = {
        "CPU": start_command("POLICY", cpu=True),
        "GPU": start_command("POLICY", dtype="bfloat16"),
        "GPU, the trainer's own (rollout.vllm.sleep = true)": start_command("POLICY", dtype="bfloat16", sleep=True),
    }
    return [f"{name}:\n  {shell(*command)}" for name, command in variants.items()]
