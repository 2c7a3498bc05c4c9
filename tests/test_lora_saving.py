"""Adapters on disk: saved as plain checkpoints and in peft's format, loaded, resumed; merged in host memory."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

import runs
import tiny
from adapters import SMALL, adapted, logprobs, resident_bytes, stirred
from batches import (
    bfloat16,
    engine,
    equal_weights,
    largest_gap,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import RewardModel, models, saving, train
from fastppo.config import ModelConfig
from fastppo.microbatch import gather
from fastppo.models.files import _around
from fastppo.resume import LATEST
from test_checkpoint import assert_same_run, back_to

peft = pytest.importorskip("peft", reason="pip install 'fastppo[lora]'")

GPU = torch.device("cuda", 0)


class MadeOnTheGPU(TorchDispatchMode):
    """Storages there that an operation made, by its name."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device == GPU]
        self.found += [func.name() for x in tensors if x.untyped_storage()._cdata not in self.known]
        return out


@pytest.mark.parametrize("aside", [False, True], ids=["as it is", "as an asynchronous checkpoint has it"])
def test_merging_is_on_the_host_and_makes_nothing_where_the_base_is(aside: bool) -> None:
    """A base on a GPU, played by tensors that know their device and have no memory; adapters beside it, or copied to
    host memory as a checkpoint that is written beside training has them: the two cannot be added where they are."""
    policy = adapted(moved=True)
    expected = models.plain_weights(policy)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    model = _around(policy, saving._in_host_memory(trained, {})) if aside else policy
    mode, own = FakeTensorMode(allow_non_fake_inputs=True), {id(p) for p in policy.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) in own:
                there = FakeTensor(mode, torch.empty(p.shape, dtype=p.dtype, device="meta"), GPU)
                setattr(module, name, nn.Parameter(there, requires_grad=p.requires_grad))
    devices = {p.device.type for p in model.parameters()}
    assert devices == ({"cuda", "cpu"} if aside else {"cuda"})
    known = {x.untyped_storage()._cdata for x in model.parameters()}
    with mode, MadeOnTheGPU(known) as made:
        merged = models.plain_weights(model)
    assert made.found == []
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in expected.items()}
    assert {name for name, x in merged.items() if x.device.type == "cpu"} == {n for n in merged if "proj" in n}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_is_saved_is_what_was_trained(architecture: str, tmp_path: Path) -> None:
    """As plain checkpoints for everybody, and as adapters in peft's format; the base is left as it is."""
    tiny.raw_lm(architecture).save_pretrained(tmp_path / "base")
    base = ModelConfig(path=str(tmp_path / "base"))
    made = (
        with_random_head(engine(models.adapt(models.load_policy(base), SMALL)))
        if architecture != "gpt2"
        else engine(models.adapt(models.load_policy(base), SMALL))
    )
    for model in (made.policy, made.critic):
        stirred(model)
    before = weights(made.policy)
    made.save(tmp_path)
    assert equal_weights(weights(made.policy), before)
    expected = [logprobs(made.policy), models.values(made.critic, gather(trajectories(), range(8)))]  # pyright: ignore
    plain = models.load_policy(ModelConfig(path=str(tmp_path / "policy")))
    critic = models.load_critic(str(tmp_path / "critic"))
    assert weights(plain).keys() == weights(tiny.policy(architecture)).keys()
    torch.testing.assert_close(logprobs(plain), expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        models.values(critic, gather(trajectories(), range(8))), expected[1], atol=1e-4, rtol=1e-4
    )
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded: Any = peft.PeftModel.from_pretrained(lm, str(tmp_path / "policy" / "adapter"))
    torch.testing.assert_close(logprobs(models.prepare_policy(loaded)), expected[0], atol=1e-5, rtol=0)
    body = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=1)
    valued: Any = peft.PeftModel.from_pretrained(body, str(tmp_path / "critic" / "adapter")).merge_and_unload()
    values = models.values(models.prepare(valued), gather(trajectories(), range(8)))
    torch.testing.assert_close(values, expected[1], atol=1e-4, rtol=1e-4)


def test_merging_in_bfloat16_rounds_once() -> None:
    """The copy, not the base: W + B A in float32, then bfloat16."""
    policy = stirred(models.adapt(bfloat16(tiny.policy()), SMALL))
    before, merged = weights(policy), models.plain_weights(policy)
    layer: Any = policy.model.layers[0].self_attn.q_proj
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (32 / 4)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], (layer.base_layer.weight.float() + change).bfloat16())
    assert merged.keys() == bfloat16(tiny.policy()).state_dict().keys()
    assert equal_weights(weights(policy), before)
    shared = [k for k, w in merged.items() if any(w.data_ptr() == p.data_ptr() for p in policy.parameters())]
    assert {*merged} - {*shared} == {k for k in merged if "proj" in k}


def test_a_reward_adapter_scores_as_peft_does(tmp_path: Path) -> None:
    """A classifier's adapter and head on the policy's base, trained elsewhere; no tensor of the base is copied."""
    path = str(tmp_path / "reward")
    tiny.raw_lm().save_pretrained(tmp_path / "base")
    raw = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    theirs = stirred(peft.get_peft_model(raw, peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")))
    theirs.save_pretrained(path)
    theirs.base_model.model.config.pad_token_id = 0
    policy = models.adapt(models.load_policy(ModelConfig(path=str(tmp_path / "base"))), SMALL)
    reward = models.load_reward_model(path, base=policy)
    rows = [[*p, *r] for p, r in trajectories().sequences()]
    with torch.no_grad():
        expected = [float(theirs.eval()(input_ids=torch.tensor([ids])).logits[0, 1]) for ids in rows]
    ours = RewardModel(reward, label=1)._score(rows)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert resident_bytes(policy, reward) < 1.5 * resident_bytes(policy)
    assert not any(p.requires_grad for p in reward.parameters()) and len(engine(policy)._policy.weights) == 28
    with pytest.raises(ValueError, match="is an adapter, which needs a base: set memory.share = 'lora'"):
        models.load_reward_model(path)
    models.save(tiny.policy(), tmp_path / "other")
    other = models.adapt(models.load_policy(ModelConfig(path=str(tmp_path / "other"))), SMALL)
    with pytest.raises(ValueError, match="was trained on '.*base', the base here is '.*other'"):
        models.load_reward_model(path, base=other)


SHARED: dict[str, Any] = {
    "memory": {"share": "lora", "lora_rank": 4},
    "rewards": [{"kind": "function", "target": "runs:noisy"}],
    "train": {"total_steps": 4, "eval_every": 3, "save_every": 2, "keep_last": 0},
}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_resumed_run_is_the_undisturbed_run(dtype: str, tmp_path: Path) -> None:
    """And only what trains is in its state: the base is where the run file says."""
    settings = runs.merged(SHARED, {"policy": {"path": runs.checkpoint(tmp_path / "policy"), "dtype": dtype}})
    config = runs.config(tmp_path, **settings)
    undisturbed = train(config)
    shutil.copytree(undisturbed, tmp_path / "again")
    back_to(tmp_path / "again", 2)
    again = runs.config(tmp_path, **runs.merged(settings, {"out": str(tmp_path / "again")}))
    assert_same_run(undisturbed, train(again, resume=LATEST))
    final = undisturbed / "checkpoints" / "final"
    state = load_file(final / "state.safetensors")
    assert {k for k in state if "/" not in k.partition("/")[2] and "lora_" not in k} == {
        *("critic/score.weight", "critic/score.bias")
    }
    trained = [AutoModelForCausalLM.from_pretrained(p) for p in (final / "policy", tmp_path / "policy")]
    assert largest_gap(*(weights(model) for model in trained)) > 0
    with pytest.raises(ValueError, match="memory.lora_rank was 4, is 8"):
        train(runs.config(tmp_path, **runs.merged(settings, {"memory": {"lora_rank": 8}})), resume=LATEST)
