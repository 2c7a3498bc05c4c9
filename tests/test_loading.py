"""What loading takes of the host's memory: what stays, and next to nothing beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import tiny
from fastppo import models
from fastppo.memory.ledger import Ledger
from fastppo.models.files import refuse_damaged
from fastppo.models.heads import value_head

MOST = 0.3  # of a checkpoint's bytes, beside what stays
PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from peak_memory import PeakMemory, resident_bytes
from fastppo import models
from fastppo.config_inputs import ModelConfig
roles, path, dtype = sys.argv[2:]
before = resident_bytes()
with PeakMemory(0.005) as peak:
    if roles == "critic":
        made = [models.load_critic(path, dtype)]
    else:
        policy = models.load_policy(ModelConfig(path=path, dtype=dtype))
        made = [policy]
    if roles == "four":
        made += [models.critic_from(policy), models.reference_of(policy), models.load_reward_model(path + "-r", dtype)]
held = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for x in made for p in x.parameters()}
print(json.dumps({"peak": peak.peak_bytes - before, "held": sum(held.values())}))
"""


def saved(folder: Path, dtype: str) -> Path:
    """A checkpoint of 400 MB in float32, and a reward model's beside it."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=8,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.num_labels = 1
    for cls, name in ((AutoModelForCausalLM, "model"), (AutoModelForSequenceClassification, "model-r")):
        cls.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder / name)
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_what_stays_and_less_than_a_third_of_a_checkpoint(dtype: str, tmp_path: Path) -> None:
    """Resident size of a process that loads one role, or all four from checkpoints of one shape."""
    path = saved(tmp_path, dtype)
    size = (path / "model.safetensors").stat().st_size
    bench = str(Path(__file__).parent.parent / "fastppo" / "bench" / "ppo_iteration")
    for roles in ("policy", "critic", "four"):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, bench, roles, str(path), dtype], capture_output=True, text=True, check=True
        )
        took = json.loads(done.stdout.splitlines()[-1])
        assert took["peak"] - took["held"] <= MOST * size, (roles, took, size)


def test_looking_for_nan_makes_no_copy() -> None:
    policy = tiny.policy()
    with Ledger() as ledger:
        refuse_damaged("here", policy, {"missing_keys": [], "mismatched_keys": []}, ())
    assert ledger.peak.total() < 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(bad: float) -> None:
    policy = tiny.policy()
    with torch.no_grad():
        policy.get_parameter("model.layers.1.mlp.up_proj.weight").view(-1)[7] = bad
    with pytest.raises(ValueError, match="has NaN or infinity in 1 tensors, the first is 'model.layers.1.mlp.up_proj"):
        refuse_damaged("here", policy, {"missing_keys": [], "mismatched_keys": []}, ())


def test_a_bfloat16_critic_keeps_its_float32_head_to_the_last_bit(tmp_path: Path) -> None:
    critic = models.critic_from(tiny.policy())
    with torch.no_grad():
        value_head(critic).weight.copy_(torch.randn(value_head(critic).weight.shape))
    critic.save_pretrained(tmp_path)
    loaded = models.load_critic(str(tmp_path), "bfloat16")
    assert torch.equal(value_head(loaded).weight, value_head(critic).weight)
    assert {p.dtype for p in loaded.base_model.parameters()} == {torch.bfloat16}
    assert type(loaded)._keep_in_fp32_modules_strict is None
