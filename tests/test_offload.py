"""What waits in host memory comes when a run uses it, leaves nothing behind, and changes no result by a bit.

The rehearsal is on a CPU, see test_offload_mover.py.
"""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import runs
import tiny
from batches import SCORES, bfloat16, engine, equal_weights, prompts, trajectories, weights
from fastppo import PPOEngine, models, train
from fastppo.config_offload import OffloadConfig
from fastppo.memory.ledger import Ledger
from fastppo.offload.layers import size_of
from fastppo.offload.mover import Mover, tensors_of
from fastppo.offload.roles import optimizer_tensors
from fastppo.resume import LATEST
from offloading import ALL, copied
from test_checkpoint import assert_same_run, back_to

WAYS = {
    "reference moves": OffloadConfig(reference="move"),
    "reference streams": OffloadConfig(reference="stream"),
    "critic moves": OffloadConfig(critic="move"),
    "critic and its optimizer": OffloadConfig(critic="move", critic_optimizer="move"),
    "optimizers": OffloadConfig(critic_optimizer="move", policy_optimizer="move"),
    "all": ALL,
}


# --- the engine -----------------------------------------------------------------------------------------------------


def made_with(offload: OffloadConfig, dtype: str = "float32", **optimizer: Any) -> PPOEngine:
    shape: Any = tiny.CONFIGS["llama"]()
    shape.intermediate_size = 128  # weights of 4096 numbers, which torchao quantizes
    torch.manual_seed(0)
    policy = models.prepare_policy(models.new_causal_lm(shape))
    policy = policy if dtype == "float32" else bfloat16(policy)
    ppo = {"num_epochs": 2, "num_minibatches": 2, "target_kl": 0.05, "roll_back": True, "max_tokens_per_microbatch": 40}
    return engine(policy, ppo=ppo, optimizer=optimizer, offload=offload)


def iteration(made: PPOEngine) -> dict[str, float]:
    return made.update(made.score(trajectories(), SCORES))


def state(made: PPOEngine) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in made.tensors().items()}


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step, for seconds per shape; what it compiles is what runs here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize(
    ("way", "form"),
    [*((way, "bfloat16") for way in WAYS), *(("all", form) for form in ("float32", "rounded at random", "8-bit"))],
)
def test_iterations_are_the_same_bit_for_bit(way: str, form: str) -> None:
    """Weights, masters, moments and every number that is logged."""
    if form == "8-bit":
        pytest.importorskip("torchao")
    dtype = "float32" if form == "float32" else "bfloat16"
    options = {"8-bit": {"kind": "adamw-8bit"}, "rounded at random": {"masters": "stochastic"}}.get(form, {})
    kept, other = (made_with(offload, dtype, **options) for offload in (OffloadConfig(), WAYS[way]))
    for _ in range(2):
        assert iteration(kept) == iteration(other)
    a, b = state(kept), state(other)
    assert any(name.endswith("exp_avg.codes") for name in a) == (form == "8-bit")
    assert len(a) > len(weights(kept.policy)) and equal_weights(a, b)
    assert other.generate(prompts()).sequences() == kept.generate(prompts()).sequences()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_a_phase_the_device_has_nothing_of_what_moves_and_the_host_has_it_once(dtype: str) -> None:
    """By the memory that was handed out: as much as where all is kept, for one place each is all there is."""
    left: dict[str, list[int]] = {"kept": [], "moved": []}
    critic = 0
    for name, offload in (("kept", OffloadConfig()), ("moved", ALL)):
        with Ledger() as ledger:
            policy = tiny.policy() if dtype == "float32" else bfloat16(tiny.policy())
            made = engine(policy, offload=offload)
            for _ in range(2):
                experience = made.score(trajectories(), SCORES)
                left[name].append(ledger.live.total())
                made.update(experience)
                del experience
                left[name].append(ledger.live.total())
        assert made.critic is not None
        critic = size_of(tensors_of(made.critic))
    for i, (kept, moved) in enumerate(zip(left["kept"], left["moved"], strict=True)):
        from_score_to_update = critic if i % 2 == 0 else 0
        assert moved == pytest.approx(kept + from_score_to_update, abs=2000), (i, left, critic)


def test_each_role_comes_once_and_goes_once_in_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what goes, only what has changed is copied."""
    made = made_with(ALL)
    iteration(made)
    assert made._critic is not None and made.reference is not None
    moments = sum(x.numel() * x.element_size() for name, x in made.tensors().items() if name.count("/") == 2)
    reference, critic = (size_of(tensors_of(model)) for model in (made.reference, made._critic.model))
    learned = sum(p.numel() * p.element_size() for p in made._critic.model.parameters())
    with copied(monkeypatch) as seen:
        iteration(made)
    assert seen == {"in": reference + critic + moments, "out": critic + moments}
    assert 0 < learned <= critic


@pytest.mark.parametrize("sampled", [False, True], ids=["log-probs computed", "log-probs of the sampler"])
def test_roles_are_on_the_device_for_their_part_of_an_iteration(sampled: bool) -> None:
    """The critic from scoring to the end of its half of the update; never two optimizers at a time. Where the policy's
    first forward has yet to check the sampler's log-probs, its half comes first, without the critic."""
    made = made_with(ALL)
    policy, critic, reference = made._policy, made._critic, made._reference_at
    assert critic is not None and made.reference is not None
    parts: dict[str, Any] = {
        "reference": reference,
        "critic": critic.weights_at,
        "critic_optimizer": critic.optimizer_at,
        "policy_optimizer": policy.optimizer_at,
    }
    seen: list[tuple[str, tuple[str, ...]]] = []

    def look(name: str, *_: Any) -> None:
        entry = (name, tuple(part for part, at in parts.items() if at.is_here))
        if entry not in seen[-1:]:
            seen.append(entry)

    rollout = made.generate(prompts()) if sampled else trajectories()
    for name, model in (("policy", policy.model), ("critic", critic.model), ("reference", made.reference)):
        model.base_model.register_forward_pre_hook(partial(look, name))
    made.update(made.score(rollout, SCORES))
    scoring = [("policy", ("reference",)), ("reference", ("reference", "critic")), ("critic", ("critic",))]
    halves = [("critic", ("critic", "critic_optimizer")), ("policy", ("policy_optimizer",))]
    assert seen == (scoring[1:] + halves[::-1] if sampled else scoring + halves)
    assert not any(at.is_here for at in parts.values())


def test_an_experience_that_is_refused_leaves_no_model_on_the_device() -> None:
    """The reference is on its way by then."""
    from fastppo.checks import RolloutError

    made = made_with(ALL)
    logprobs = [[-9.0] * len(response) for _, response in trajectories().sequences()]
    with pytest.raises(RolloutError, match="nats a token off the trainer's"):
        made.score(trajectories(logprobs=logprobs, policy_version=0), SCORES)
    assert not getattr(made._reference_at, "is_here", True)


@pytest.mark.parametrize("to", ["keep", "move"])
def test_a_checkpoint_is_of_neither_place(to: str) -> None:
    """Taken where everything waits in host memory, it is loaded where it stays; and the other way round."""
    ways = {"keep": OffloadConfig(), "move": ALL}
    undisturbed, stopped = made_with(ways["keep"]), made_with(ways[{"keep": "move", "move": "keep"}[to]])
    resumed = made_with(ways[to])
    for made in (undisturbed, stopped):
        iteration(made)
    resumed.load(stopped.state(), sorted(state(stopped).items()))
    for role in (resumed._policy, resumed._critic) if to == "move" else ():
        assert role is not None and isinstance(role.optimizer_at, Mover)
        waiting = {x.data_ptr() for x in role.optimizer_at.host.values()}
        assert {x.data_ptr() for _, x in optimizer_tensors(role)} == waiting, "what was loaded waits elsewhere"
    resumed.generator.set_state(stopped.generator.get_state())
    assert iteration(undisturbed) == iteration(resumed)
    assert equal_weights(state(undisturbed), state(resumed))
    resumed.roll_back(sorted(state(stopped).items()))
    assert equal_weights(state(resumed), state(stopped))


def test_an_update_that_runs_out_of_memory_is_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, other = made_with(OffloadConfig()), made_with(ALL)
    inner, found = models.hidden_states, []
    for made in (kept, other):
        calls: list[int] = []

        def hidden_states(model: Any, batch: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) in (3, 9, 14):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(model, batch)

        monkeypatch.setattr(models, "hidden_states", hidden_states)
        found.append(iteration(made))
        assert made.budget.failures == 3
    assert found[0] == found[1] and equal_weights(state(kept), state(other))


def test_what_has_no_weights_of_its_own_is_refused() -> None:
    pytest.importorskip("peft")
    from fastppo.config import MemoryConfig

    policy = models.adapt(tiny.policy(), MemoryConfig(share="lora", lora_rank=4))
    for key in ("reference", "critic"):
        with pytest.raises(ValueError, match="on the base of the policy has no weights of its own to offload"):
            engine(policy, offload=replace(OffloadConfig(), **{key: "move"}))
    with pytest.raises(ValueError, match="there is no model to move"):
        engine(ppo={"kl_coef": 0.0}, offload=OffloadConfig(reference="move"))
    with pytest.raises(ValueError, match="there is no critic: offload.critic and"):
        engine(ppo={"advantage": "reinforce++"}, offload=OffloadConfig(critic_optimizer="move"))


def test_adapters_train_beside_a_reference_and_a_reward_model_that_move() -> None:
    """What has weights of its own beside a shared base: a reference that is named, and a reward model."""
    pytest.importorskip("peft")
    from fastppo.config import MemoryConfig

    found = []
    for offload in (OffloadConfig(), OffloadConfig(reference="stream", policy_optimizer="move")):
        policy = models.adapt(tiny.policy(), MemoryConfig(share="lora", lora_rank=4))
        made = engine(policy, reference=tiny.policy(seed=1), offload=offload)
        found.append((iteration(made), state(made)))
    assert found[0][0] == found[1][0] and equal_weights(found[0][1], found[1][1])


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run file may only ask for it on a GPU; what it then does needs none. As to a GPU, what is loaded is copied to
    the device: tensors mapped from a file begin anywhere, and products on a CPU differ by where in the last bit.
    """
    monkeypatch.setattr("fastppo.memory.start.require_gpu", lambda config, device: None)
    monkeypatch.setattr(models, "to_device", lambda model, device: copy.deepcopy(model))


def run_of(folder: Path, out: str, **changes: Any) -> Any:
    """With a reward model, a critic that begins as it, roll-back, micro-batches, evaluation and checkpoints."""
    classifier = runs.checkpoint(folder / "reward", kind=AutoModelForSequenceClassification, seed=3)
    rewards = [{"kind": "model", "target": classifier}]
    ppo = {"num_epochs": 2, "num_minibatches": 2, "max_tokens_per_microbatch": 24, "target_kl": 0.5, "roll_back": True}
    changes |= {"train": {"total_steps": 3, "save_every": 1, "keep_last": 0, "eval_every": 2}}
    return runs.config(folder, rewards=rewards, ppo=ppo, critic={"init": "reward"}, out=str(folder / out), **changes)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("reward", [pytest.param("move", marks=pytest.mark.slow), "stream"])
def test_a_run_ends_bit_for_bit_where_it_would_have(reward: str, tmp_path: Path) -> None:
    """Stopped and resumed in between with the other choice, too."""
    ways = {**asdict(ALL), "reward": reward, "reference": reward}
    kept, moved = (train(run_of(tmp_path, name, offload=x)) for name, x in (("kept", {}), ("moved", ways)))
    assert_same_run(kept, moved)
    for name, x in (("kept", ways), ("moved", {})):
        shutil.copytree(tmp_path / name, tmp_path / f"{name} resumed")
        back_to(tmp_path / f"{name} resumed", 1)
        assert_same_run(kept, train(run_of(tmp_path, f"{name} resumed", offload=x), resume=LATEST))


def test_on_a_cpu_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="offload.reference = 'move' sends what a GPU need not hold to host memory, and"
    ):
        train(runs.config(tmp_path, offload={"reference": "move"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": {"reference": "move"}, "ppo": {"kl_coef": 0.0}}, "offload.reference = 'move' needs a reference"),
        ({"offload": {"reward": "stream"}}, "offload.reward = 'stream' needs a reward of kind 'model'"),
        ({"offload": {"critic": "move"}, "ppo": {"advantage": "reinforce++"}}, "needs a critic"),
        ({"offload": {"critic": "stream"}}, "offload.critic must be one of"),
        ({"offload": {"policy": "move"}}, "unknown key 'offload.policy'"),
        (
            {"offload": {"reference": "move"}, "memory": {"share": "lora"}},
            "with memory.share = 'lora' it has no weights",
        ),
        ({"offload": {"critic": "move"}, "memory": {"share": "lora"}}, "with memory.share = 'lora' it has no weights"),
        (
            {"offload": {"policy_optimizer": "move"}, "policy_optimizer": {"kind": "adamw-cpu-offload"}},
            "with policy_optimizer.kind = 'adamw-cpu-offload' it is in host memory already",
        ),
    ],
)
def test_what_cannot_move_is_refused_by_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runs.config(tmp_path, **changes)
