"""The four roles: where values start, what is saved is what was trained, and recomputation changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Lfm2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

import tiny
from batches import (
    SCORES,
    bfloat16,
    engine,
    largest_gap,
    recorded_gradients,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import models
from fastppo.config import ModelConfig
from fastppo.microbatch import gather
from fastppo.score import action_logprobs, state_values


def raw_reward_model(architecture: str = "llama", labels: int = 1) -> PreTrainedModel:
    config = tiny.CONFIGS[architecture]()
    config.num_labels = labels
    config.pad_token_id = 0
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_config(config)


def values_of(critic: PreTrainedModel) -> torch.Tensor:
    return state_values(critic, trajectories(), max_tokens=100)[0]


def moved(made: Any) -> Any:
    """After one update, so that nothing is at its initial value."""
    made.update(made.score(trajectories(), SCORES))
    return made


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_critic_from_the_policy_starts_at_zero(architecture: str) -> None:
    """CORRECTNESS D1: with the policy's body, so that the first value gradient is of use."""
    policy = tiny.policy(architecture)
    critic = models.critic_from(policy)
    assert torch.count_nonzero(values_of(critic)) == 0
    batch = gather(trajectories(), range(8))
    assert torch.equal(models.hidden_states(critic, batch), models.hidden_states(policy, batch))


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_critic_from_a_reward_model_is_its_score_path(architecture: str, label: int) -> None:
    """CORRECTNESS D1: V of the last token is what transformers' own classifier gives the sequence."""
    raw = raw_reward_model(architecture, labels=3)
    raw.set_attn_implementation("eager")
    rollout = trajectories()
    with torch.no_grad():
        ids = [torch.tensor([[*p, *r]]) for p, r in rollout.sequences()]
        expected = torch.cat([raw.eval()(input_ids=x).logits[:, label] for x in ids])
    critic = models.critic_from(models.prepare(raw), label=label)
    torch.testing.assert_close(state_values(critic, rollout, max_tokens=100)[1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_saved_policy_is_the_trained_one(architecture: str, tmp_path: Path) -> None:
    """CORRECTNESS P22: by AutoModelForCausalLM, without fastppo."""
    made = moved(engine(tiny.policy(architecture)))
    made.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", attn_implementation="eager")
    assert largest_gap(weights(loaded), weights(made.policy)) == 0
    prompt, response = trajectories().sequences()[2]
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([prompt + response])).logits[0].float()
    plain = torch.log_softmax(logits[len(prompt) - 1 : -1], -1).gather(1, torch.tensor(response)[:, None])[:, 0]
    ours = action_logprobs(made.policy, trajectories(), temperature=1.0, max_tokens=100)
    counts = trajectories().action_counts[:2].sum()
    torch.testing.assert_close(ours[counts : counts + len(response)], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_saved_critic_is_the_trained_one(architecture: str, tmp_path: Path) -> None:
    """By AutoModelForTokenClassification, without fastppo; and by load_critic."""
    made = moved(engine(tiny.policy(architecture)))
    made.save(tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", attn_implementation="eager").eval()
    prompt, response = trajectories().sequences()[0]
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, 0]
    values = values_of(made.critic)
    assert float(values.abs().min()) > 0
    torch.testing.assert_close(values[: len(response)], expected, atol=1e-5, rtol=0)
    loaded = models.load_critic(str(tmp_path / "critic"))
    assert largest_gap(weights(loaded), weights(made.critic)) == 0
    torch.testing.assert_close(values_of(loaded), values, atol=1e-7, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_critic_keeps_a_float32_head(architecture: str, tmp_path: Path) -> None:
    """Bit for bit through saving and loading, and the values too."""
    made = moved(engine(bfloat16(tiny.policy(architecture))))
    head = models.value_head(made.critic)
    assert head.weight.dtype == torch.float32 and made.critic.dtype == torch.bfloat16
    assert not torch.equal(head.weight, head.weight.bfloat16().float())  # something would be lost
    made.save(tmp_path)
    loaded = models.load_critic(str(tmp_path / "critic"), "bfloat16")
    assert torch.equal(models.value_head(loaded).weight, head.weight)
    assert largest_gap(weights(loaded), weights(made.critic)) == 0 and loaded.dtype == torch.bfloat16
    torch.testing.assert_close(values_of(loaded), values_of(made.critic), atol=1e-6, rtol=0)


@pytest.mark.parametrize("source", ["lm", "reward"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_critic_loaded_from_another_kind_of_checkpoint_starts_at_zero(
    source: str, architecture: str, tmp_path: Path
) -> None:
    raw = tiny.raw_lm(architecture) if source == "lm" else raw_reward_model(architecture)
    raw.save_pretrained(tmp_path)
    critic = models.load_critic(str(tmp_path))
    assert torch.count_nonzero(values_of(critic)) == 0
    saved, loaded = (weights(m.base_model) for m in (raw, critic))
    assert largest_gap(saved, loaded) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_policy_equals_the_one_saved(dtype: Any, tmp_path: Path) -> None:
    policy = tiny.policy().to(getattr(torch, dtype))
    models.save(policy, tmp_path)
    loaded = models.load_policy(ModelConfig(path=str(tmp_path), dtype=dtype))
    assert loaded.dtype == policy.dtype and largest_gap(weights(loaded), weights(policy)) == 0


def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    """transformers would fill it with noise."""
    raw = tiny.raw_lm()
    state = {n: p for n, p in raw.state_dict().items() if "layers.1.mlp.up_proj" not in n}
    raw.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 tensors.*up_proj"):
        models.load_policy(ModelConfig(path=str(tmp_path)))


def test_logits_made_in_an_unknown_way_are_refused() -> None:
    raw = tiny.raw_lm()
    raw.lm_head.register_forward_hook(lambda _m, _i, out: out / 2)
    with pytest.raises(ValueError, match="in a way fastppo does not know"):
        models.prepare_policy(raw)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        policy = tiny.policy(layers=tiny.LAYERS[on])
        made = with_random_head(engine(policy, critic=models.critic_from(policy, layers=tiny.LAYERS[on])))
        found.append(recorded_gradients(made))
        moved(made)
    assert largest_gap(*found) <= 1e-6
    assert any(n.startswith("critic.model") for n in found[0]) and any(n.startswith("policy.model") for n in found[0])


def test_reference_stays_while_the_policy_moves() -> None:
    made = engine()
    before = weights(made.reference)
    moved(moved(made))
    assert largest_gap(weights(made.reference), before) == 0 < largest_gap(weights(made.policy), before)
    assert not any(p.requires_grad for p in made.reference.parameters())  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("ppo", [{"kl_coef": 0.0}, {"kl_coef": 0.0, "advantage": "reinforce++"}], ids=str)
def test_models_that_nothing_needs_are_not_made(ppo: dict[str, Any]) -> None:
    made = engine(ppo=ppo)
    assert made.reference is None
    assert (made.critic is None) == (ppo.get("advantage") == "reinforce++")


def test_end_tokens_are_those_of_generation_config_model_and_tokenizer() -> None:
    policy = tiny.policy()
    policy.generation_config.eos_token_id = [4, 5]
    policy.config.eos_token_id = 5
    tokenizer: Any = type("Tokenizer", (), {"eos_token_id": 6})()
    assert models.eos_token_ids(policy, tokenizer) == (4, 5, 6)
    assert isinstance(policy.config, LlamaConfig)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (
            Lfm2Config(
                vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, layer_types=["conv", "full_attention"],
            ),
            "conv",
        ),
        (
            Qwen3NextConfig(
                vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2,
                linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
            ),
            "linear_attention",
        ),
    ],
    ids=["Lfm2", "Qwen3Next"],
)  # fmt: skip
def test_layers_that_would_mix_packed_sequences_are_refused(config: Any, kinds: str) -> None:
    with pytest.raises(ValueError, match=rf"layers \({kinds}\) other than .* would leak"):
        models.prepare_policy(models.new_causal_lm(config))


def test_a_model_whose_packed_sequences_hear_each_other_is_refused() -> None:
    """Whatever its config says of its layers."""
    raw = tiny.raw_lm()
    raw.model.layers[0].register_forward_hook(lambda module, args, out: out + out.cumsum(1))
    with pytest.raises(ValueError, match="LlamaForCausalLM does not keep packed sequences apart"):
        models.prepare_policy(raw)


def test_rotary_positions_that_follow_the_longest_sequence_are_refused() -> None:
    config = LlamaConfig(**tiny._SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rotary positions of type 'dynamic'"):
        models.prepare_policy(models.new_causal_lm(config))
