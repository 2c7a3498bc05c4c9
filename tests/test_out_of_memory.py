"""Where memory runs out, the same step is made again in smaller portions, and comes out the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from batches import LENGTHS, SCORES, assert_same_numbers, bfloat16, engine, largest_gap, prompts, trajectories, weights
from fastppo import PPOEngine, models
from fastppo.batch import Sampling
from fastppo.cli import main
from fastppo.out_of_memory import OutOfMemory, is_out_of_memory
from fastppo.resume import LATEST
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.embedded import EmbeddedEngine
from fastppo.trainer import train

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice."
LONGEST, TOTAL = max(map(sum, LENGTHS)), sum(map(sum, LENGTHS))
PPO = {"num_epochs": 2, "num_minibatches": 2, "entropy_coef": 0.1}


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Forwards of the body that run out of memory when `when(number of the call, tokens)` says so; returns the tokens
    of every call. `late`: in the middle of the backward instead."""
    inner = models.hidden_states

    def plant(when: Callable[[int, int], bool], *, late: bool = False) -> list[int]:
        seen: list[int] = []

        def hidden_states(model: Any, batch: Any) -> Any:
            seen.append(len(batch.input_ids))
            failing = when(len(seen), seen[-1])
            if failing and not late:
                raise torch.OutOfMemoryError(REASON)
            out = inner(model, batch)
            if failing and out.requires_grad:
                layer = model.base_model.layers[0].mlp.down_proj.weight
                handle = layer.register_hook(lambda grad: (handle.remove(), _fail()))
            return out

        monkeypatch.setattr(models, "hidden_states", hidden_states)
        return seen

    return plant


def _fail() -> None:
    raise torch.OutOfMemoryError(REASON)


def iteration(made: PPOEngine) -> dict[str, float]:
    return made.update(made.score(trajectories(), SCORES))


def trained(dtype: str = "float32", **ppo: Any) -> PPOEngine:
    policy = tiny.policy() if dtype == "float32" else bfloat16(tiny.policy())
    return engine(policy, ppo={**PPO, **ppo})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("limit", [LONGEST, TOTAL // 3], ids=["one sequence", "a third"])
def test_an_update_that_ran_out_of_memory_ends_where_the_undisturbed_one_does(
    fails: Callable[..., list[int]], dtype: str, late: bool, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients, statistics and the order of minibatches: nothing of a failed attempt is left in the next one."""
    undisturbed, disturbed = trained(dtype), trained(dtype)
    expected = iteration(undisturbed)
    experience = disturbed.score(trajectories(), SCORES)
    seen = fails(lambda call, tokens: tokens > limit, late=late)
    found = disturbed.update(experience)
    assert max(seen) > limit >= min(seen)
    assert found.pop("memory/max_tokens_per_microbatch") == disturbed.budget.size < TOTAL
    assert_same_numbers(expected, found, 1e-5 if dtype == "float32" else 2e-2)
    gap = largest_gap(weights(undisturbed.policy), weights(disturbed.policy))
    assert gap <= (1e-6 if dtype == "float32" else 8e-3)
    assert capsys.readouterr().out.count("out of memory in the update (CUDA out of memory. Tried") == (
        disturbed.budget.failures
    )


def test_a_gradient_that_was_not_handed_to_its_master_is_not_counted_twice() -> None:
    """Memory may run out between a bfloat16 gradient's making and its adding up in float32."""
    policies = [bfloat16(tiny.policy()) for _ in range(2)]
    left = [1]

    def fail_once(_: Any) -> None:
        if left:
            left.pop()
            _fail()

    policies[1].get_parameter("model.layers.1.mlp.up_proj.weight").register_post_accumulate_grad_hook(fail_once)
    made = [engine(policy, ppo=PPO) for policy in policies]
    norms = [iteration(one)["policy/grad_norm"] for one in made]
    assert not left and made[1].budget.failures == 1
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


def test_scores_are_the_same_where_scoring_ran_out_of_memory(fails: Callable[..., list[int]]) -> None:
    expected = trained().score(trajectories(), SCORES)
    fails(lambda call, tokens: tokens > TOTAL // 4)
    made = trained()
    found = made.score(trajectories(), SCORES)
    for name in ("logprobs", "ref_logprobs", "values", "advantages"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert made.budget.size <= TOTAL // 4


def test_what_failed_is_halved_and_not_what_the_config_allows(fails: Callable[..., list[int]]) -> None:
    """A budget of a thousand times the batch would be halved ten times to no effect."""
    seen = fails(lambda call, tokens: call == 1)
    made = trained(max_tokens_per_microbatch=1000 * TOTAL)
    made.score(trajectories(), SCORES)
    assert made.budget.failures == 1 and made.budget.size == TOTAL // 2 and max(seen[1:]) <= TOTAL // 2


def test_later_iterations_begin_with_what_fitted_and_take_a_longer_sequence_whole(
    fails: Callable[..., list[int]],
) -> None:
    made = trained(max_tokens_per_microbatch=100)
    seen = fails(lambda call, tokens: call < 30 and tokens > LONGEST)
    iteration(made)
    assert made.budget.size <= LONGEST
    seen.clear()
    seen += [0] * 30
    made.update(made.score(trajectories([(20, 30), (3, 2)]), [1.0, 0.0]))
    assert max(seen) == 50 and made.budget.size <= LONGEST


def test_a_sequence_over_the_configs_budget_is_still_refused() -> None:
    with pytest.raises(ValueError, match="sequence 2 has 15 tokens, more than max_tokens_per_microbatch = 14"):
        trained(max_tokens_per_microbatch=LONGEST - 1).score(trajectories(), SCORES)


def test_at_one_sequence_the_update_stops_with_a_sentence_and_no_gradient(fails: Callable[..., list[int]]) -> None:
    made = trained("bfloat16")
    experience = made.score(trajectories(), SCORES)
    fails(lambda call, tokens: True)
    with pytest.raises(OutOfMemory, match=r"out of memory in the update, although \d+ tokens .* is the smallest.*plan"):
        made.update(experience)
    assert all(p.grad is None for p in made.policy.parameters())
    assert all(w.gradient.grad is None for w in made._policy.weights.values())


def test_another_error_is_not_taken_for_a_lack_of_memory(
    fails: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained()
    experience = made.score(trajectories(), SCORES)
    seen: list[int] = []

    def broken(model: Any, batch: Any) -> Any:
        seen.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(models, "hidden_states", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made.update(experience)
    assert len(seen) == 1


@pytest.mark.parametrize("share", [1, 3], ids=["one sample", "three samples"])
def test_a_rollout_that_ran_out_of_memory_draws_the_same_tokens(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_new_tokens=9, samples_per_prompt=share, seed=3)
    expected = EmbeddedEngine(tiny.policy()).generate(prompts(), sampling)
    made = EmbeddedEngine(tiny.policy())
    inner, started = "fastppo.rollout.decoder.Decoder._step", []

    def step(job: Any) -> None:
        if job.live > 3:
            started.append(job.live)
            raise torch.OutOfMemoryError(REASON)
        original(job)

    original = Decoder._step
    monkeypatch.setattr(inner, step)
    found = made.generate(prompts(), sampling)
    assert started and made.rows.size <= 3
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert found.logprobs is not None and expected.logprobs is not None
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(inner, lambda job: _fail())
    with pytest.raises(OutOfMemory, match="the rollout, although 1 rows is the smallest"):
        made.generate(prompts(), sampling)


def test_a_run_redoes_the_step_and_logs_it_once(
    fails: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = train(runs.config(tmp_path / "a"))
    seen = fails(lambda call, tokens: call == 14)
    disturbed = train(runs.config(tmp_path / "b"))
    assert len(seen) > 14
    ends = [models.load_policy(_policy(run)) for run in (undisturbed, disturbed)]
    assert largest_gap(weights(ends[0]), weights(ends[1])) <= 1e-6
    logged = [row.get("memory/max_tokens_per_microbatch") for row in runs.rows(disturbed / "metrics.jsonl")]
    first = next(i for i, size in enumerate(logged) if size is not None)
    assert first > 0 and all(size is None for size in logged[:first])
    assert capsys.readouterr().out.count("out of memory in") == 1


def _policy(run: Path) -> Any:
    from fastppo.config_inputs import ModelConfig

    return ModelConfig(path=str(run / "checkpoints" / "final" / "policy"))


def test_a_run_that_cannot_go_on_leaves_a_checkpoint_from_which_another_ends_the_same(
    fails: Callable[..., list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = train(runs.config(tmp_path / "a"))
    file = runs.run_file(tmp_path / "b", train={"save_every": 1})
    with monkeypatch.context() as patch:
        inner, steps = PPOEngine.update, []

        def update(self: PPOEngine, experience: Any) -> Any:
            steps.append(1)
            if len(steps) == 2:
                patch.setattr(models, "hidden_states", lambda model, batch: _fail())
            return inner(self, experience)

        patch.setattr(PPOEngine, "update", update)
        with pytest.raises(SystemExit) as ended:
            main(["train", file])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "fastppo: out of memory in the update, although" in printed.err
    assert "saved" in printed.out and "interrupted-weights" in printed.out
    resumed = train(runs.config(tmp_path / "b", train={"save_every": 1}), resume=LATEST)
    ends = [models.load_policy(_policy(run)) for run in (undisturbed, resumed)]
    assert largest_gap(weights(ends[0]), weights(ends[1])) == 0


def test_a_real_allocation_that_fails_on_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.zeros(1 << 50)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_steady_state_never_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("empty_cache in the steady state"))
    made = trained()
    for _ in range(2):
        iteration(made)
    made.generate(prompts())
