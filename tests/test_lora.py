"""share = "lora": one frozen base, a role's adapters on it, and nothing that a role computes depends on the others."""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from adapters import SMALL, adapted, logprobs, resident_bytes, step, stirred
from batches import (
    SCORES,
    assert_same_numbers,
    bfloat16,
    engine,
    equal_weights,
    largest_gap,
    prompts,
    recorded_gradients,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import Sampling, models
from fastppo.config import MemoryConfig
from fastppo.microbatch import gather
from fastppo.rollout import EmbeddedEngine
from fastppo.run import build
from fastppo.score import action_logprobs

peft = pytest.importorskip("peft", reason="pip install 'fastppo[lora]'")


def test_four_roles_weigh_what_one_does(tmp_path: Path) -> None:
    """Policy, critic, reference and a reward adapter: at most 1.05 of the base, at a width of 64 ranks."""
    config = tiny.CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = 1024, 2816, 64, 2
    policy = models.prepare_policy(models.new_causal_lm(config))
    alone = resident_bytes(policy)
    made = engine(models.adapt(policy, MemoryConfig(share="lora", lora_rank=4)))
    step(made)
    settings = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")
    peft.get_peft_model(models.reward_model_from(models.bare(policy)), settings).save_pretrained(tmp_path)
    reward = models.load_reward_model(str(tmp_path), base=policy)
    ratio = resident_bytes(made.policy, made.critic, made.reference, reward) / alone
    print(f"resident weight bytes of policy, critic, reference and reward: {ratio:.4f} of one base model")
    assert 1 < ratio <= 1.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_reference_is_the_base_bit_for_bit(architecture: str, checkpointing: bool) -> None:
    """Also after updates, and the fresh policy too: B = 0."""
    expected = logprobs(tiny.policy(architecture))
    made = engine(adapted(architecture, layers=tiny.LAYERS[checkpointing]))
    assert torch.equal(logprobs(made.policy), expected)
    for seed in range(2):
        step(made, seed)
    assert torch.equal(logprobs(made.reference), expected)
    assert not torch.equal(logprobs(made.policy), expected)


CASES: dict[str, dict[str, Any]] = {
    "minibatches": {"num_epochs": 2, "num_minibatches": 2},
    "kl in the loss": {"kl_in": "loss", "kl_estimator": "k3", "truncation": "bootstrap"},
    "roll-back": {"num_epochs": 4, "target_kl": 1e-5, "roll_back": True},
}


@pytest.mark.parametrize(("architecture", "case"), [*(("llama", case) for case in CASES), ("gpt2", "minibatches")])
def test_a_step_is_that_of_separate_copies(architecture: str, case: str) -> None:
    ends = []
    for separate in (False, True):
        policy = adapted(architecture)
        critic, reference = models.critic_from(policy), models.reference_of(policy)
        if separate:
            policy, critic, reference = (copy.deepcopy(model) for model in (policy, critic, reference))
            assert resident_bytes(policy, critic) > 1.9 * resident_bytes(policy)
        made = engine(policy, critic=critic, reference=reference, ppo=CASES[case])
        logged = [step(made, seed) for seed in range(2)]
        ends.append((weights(made.policy), weights(made.critic), logged))
    assert largest_gap(ends[0][0], ends[1][0]) <= 1e-5 and largest_gap(ends[0][1], ends[1][1]) <= 1e-5
    for one, other in zip(ends[0][2], ends[1][2], strict=True):
        assert_same_numbers(one, other, 1e-5)
    moved = weights(models.critic_from(adapted(architecture)))
    assert largest_gap(moved, ends[0][1]) > 1e-4 and ends[0][2][1]["policy/early_stop"] == float(case == "roll-back")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1)])
def test_forwards_and_backwards_of_roles_may_interleave(order: tuple[int, ...]) -> None:
    """ROLLOUT 5: with one active adapter, recomputation in the backward would find the other role's and train neither.

    Two forwards, then two backwards, of policy and critic in any order; and one backward of both.
    """
    batch, expected = gather(trajectories(), range(8)), []
    policy = stirred(adapted(layers=tiny.LAYERS[True]))
    critic = stirred(models.critic_from(policy, layers=tiny.LAYERS[True]), seed=1)
    for model in (policy, critic):
        models.hidden_states(model, batch).square().sum().backward()
        expected.append(gradients(model))
        model.zero_grad()
    losses: dict[int, torch.Tensor] = {}
    for place in order:
        if place in losses:
            losses.pop(place).backward()
        else:
            losses[place] = models.hidden_states((policy, critic)[place], batch).square().sum()
    assert all(largest_gap(gradients(m), e) == 0 for m, e in zip((policy, critic), expected, strict=True))
    for model in (policy, critic):
        model.zero_grad()
    torch.stack([models.hidden_states(m, batch).square().sum() for m in (policy, critic)]).sum().backward()
    for model, gradient in zip((policy, critic), expected, strict=True):
        assert len(gradient) == 28 and largest_gap(gradients(model), gradient) <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_each_role_recomputes_or_not_as_it_is_told(recompute: bool) -> None:
    policy = adapted(layers=tiny.LAYERS[not recompute])
    critic = models.critic_from(policy, layers=tiny.LAYERS[recompute])
    for model, wanted in ((policy, not recompute), (critic, recompute)):
        assert {m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")} == {wanted}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_the_trap_is_there_with_one_active_adapter() -> None:
    """What the test above would see: peft's own way, an adapter switched between forward and backward."""
    batch = gather(trajectories(), range(8))
    policy: Any = stirred(adapted(layers=tiny.LAYERS[True]))
    policy.add_adapter(copy.deepcopy(policy.peft_config["default"]), "other")
    policy.set_adapter("default")
    loss = models.hidden_states(policy, batch).square().sum()
    policy.set_adapter("other")
    loss.backward()
    assert gradients(policy) == {}  # of neither adapter, without a word


def test_a_role_trains_its_own_adapters_and_nothing_else() -> None:
    policy = adapted(moved=True)
    made = with_random_head(engine(policy, critic=stirred(models.critic_from(policy))))
    before = weights(made.policy), weights(made.critic)
    found = recorded_gradients(made)
    step(made)
    assert {name for name in made._policy.weights if "lora_" not in name} == set()
    assert {name for name in made._critic.weights if "lora_" not in name} == {"score.weight", "score.bias"}  # pyright: ignore
    assert {key.partition(".")[2] for key in found if key.startswith("policy.")} == {*made._policy.weights}
    for model, old in zip((made.policy, made.critic), before, strict=True):
        for name, p in model.named_parameters():  # pyright: ignore[reportOptionalMemberAccess]
            assert torch.equal(p, old[name]) == (not p.requires_grad), name
    shared = {id(p) for p in made.policy.parameters()} & {id(p) for p in made.critic.parameters()}  # pyright: ignore
    assert len(shared) == sum(not p.requires_grad for p in made.policy.parameters()) - 1  # not the LM head


@pytest.mark.parametrize(
    ("engine_kind", "dtype"), [("embedded", "float32"), ("embedded", "bfloat16"), ("generate_batch", "float32")]
)
def test_rollouts_come_from_the_policys_adapters(engine_kind: str, dtype: str) -> None:
    """Log-probs of the sampler are the trainer's, before and after an update, and not the base's."""
    base = tiny.policy() if dtype == "float32" else bfloat16(tiny.policy())
    policy = stirred(models.adapt(base, SMALL))
    made = engine(policy, rollout={"engine": engine_kind, "max_new_tokens": 12})
    tolerance = 1e-5 if dtype == "float32" else 0.3
    for _ in range(2):
        rollout = made.generate(prompts(12), Sampling(max_new_tokens=12, temperature=1.0, seed=3))
        ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=200)
        theirs = action_logprobs(models.bare(policy), rollout, temperature=1.0, max_tokens=200)
        assert rollout.logprobs is not None
        torch.testing.assert_close(rollout.logprobs, ours, atol=tolerance, rtol=0)
        assert float((rollout.logprobs - ours).abs().mean()) < 0.1 * float((rollout.logprobs - theirs).abs().mean())
        made.update(made.score(rollout, [float(len(r)) for _, r in rollout.sequences()]))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "qwen3"])
def test_other_architectures_sample_with_their_adapters(architecture: str) -> None:
    policy = adapted(architecture, moved=True)
    rollout = EmbeddedEngine(policy, max_rows=5).generate(prompts(12), Sampling(max_new_tokens=15))
    ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=200)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)


def test_a_model_that_peft_wrapped_is_a_policy() -> None:
    wrapped = peft.get_peft_model(tiny.raw_lm(), peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5))
    made = engine(models.prepare_policy(stirred(wrapped)))
    before = logprobs(made.policy)
    rollout = made.generate(prompts(), Sampling(max_new_tokens=8, temperature=1.0, seed=1))
    made.update(made.score(rollout, SCORES))
    assert torch.equal(logprobs(made.reference), before)  # an adapter that does something is part of the reference
    assert not torch.equal(logprobs(made.policy), before)
    assert len(made._policy.weights) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "bias": "all"},
    ],
    ids=str,
)
def test_adapters_where_weights_are_read_as_they_are_are_refused(settings: dict[str, Any]) -> None:
    """The loss reads the LM head's own weight, and what roles share must not learn."""
    config = tiny.CONFIGS["llama"]()
    config.attention_bias = True
    raw = models.new_causal_lm(config)
    with pytest.raises(ValueError, match="adapters must be one LoRA, not merged, on linear layers below the heads"):
        models.prepare_policy(peft.get_peft_model(raw, peft.LoraConfig(r=4, **settings)))


def test_two_adapters_are_refused() -> None:
    wrapped = peft.get_peft_model(tiny.raw_lm(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters must be one LoRA.* has 'second'"):
        models.prepare_policy(wrapped)


def test_an_adapter_that_does_not_train_is_refused_as_a_policy() -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], inference_mode=True)
    with pytest.raises(ValueError, match="nothing trains: no parameter of this LlamaForCausalLM requires a gradient"):
        engine(models.prepare_policy(peft.get_peft_model(tiny.raw_lm(), settings)))


def test_an_adapter_that_began_by_changing_its_base_changes_it_no_more() -> None:
    """PiSSA takes the policy's adapter out of the base; the critic's must not be taken out of it again."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    policy = models.prepare_policy(peft.get_peft_model(tiny.raw_lm(), settings))
    before = logprobs(policy)
    made = engine(policy)
    assert torch.equal(logprobs(policy), before) and torch.equal(logprobs(made.reference), before)


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="no adapters on LlamaForCausalLM: Target modules .*query"):
        models.adapt(tiny.policy(), MemoryConfig(share="lora", lora_targets=("query",)))


def test_the_seed_fixes_the_adapters_and_the_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    one, same, other = (models.adapt(tiny.policy(), SMALL, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    tiny.policy()
    assert equal_weights(weights(one), weights(same)) and not equal_weights(weights(one), weights(other))
    torch.set_rng_state(state)
    base = tiny.policy()
    state = torch.get_rng_state()
    models.adapt(base, SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"critic": {"init": "somewhere"}}, "so critic.init must be 'policy', got 'somewhere'"),
        ({"memory": {"share": "lora", "lora_rank": 0}}, "memory.lora_rank must be > 0 and finite, got 0"),
        ({"memory": {"lora_targets": ["all-linear", "q_proj"]}}, "memory.lora_targets is 'all-linear' or names"),
    ],
)
def test_what_sharing_cannot_do_is_refused(changes: Any, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(fragment)):
        runs.config(tmp_path, **runs.merged({"memory": {"share": "lora"}}, changes))


def test_without_peft_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded."""
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else there(name))
    with pytest.raises(ValueError, match=r"adapters need the package peft: pip install 'fastppo\[lora\]'$"):
        build(runs.config(tmp_path, policy={"path": "/nowhere"}, memory={"share": "lora"}))


def test_adapters_learn_a_rewarded_token() -> None:
    """With no weight of the base moved: not the head's either, which is why its scale is one that can be certain."""
    policy, token = models.adapt(tiny.policy(scale=20.0), MemoryConfig(lora_rank=8)), 11
    made = engine(
        policy,
        ppo={"kl_coef": 0.0, "truncation": "none", "num_epochs": 2},
        rollout={"max_new_tokens": 4, "samples_per_prompt": 4},
        optimizer={"lr": 1e-2},
    )
    rewards = []
    for _ in range(20):
        rollout = made.generate(prompts(16))
        scores = [sum(t == token for t in response) / 4 for _, response in rollout.sequences()]
        made.update(made.score(rollout, scores))
        rewards.append(sum(scores) / len(scores))
    assert rewards[0] < 0.1 and rewards[-1] > 0.9, rewards
