"""What goes wrong is named, counted and changes nothing: rewards that fail, numbers not finite, odd responses."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from batches import SCORES, engine, equal_weights, largest_gap, recorded_gradients, trajectories, weights
from endpoint import serve_fixture  # noqa: F401
from fastppo import FunctionReward, HTTPReward, PPOEngine, RewardError, Rollout, Sample, WeightedRewards, train
from fastppo.faults import NonFiniteError
from fastppo.left_out import only_scored
from fastppo.resume import LATEST
from fastppo.reward_errors import OnError
from fastppo.rewards import Scores

SKIP = [OnError("skip")]


# --- rewards --------------------------------------------------------------------------------------------------------


PLACES = [{"place": i} for i in range(8)]


def broken_for(*places: int, nan: bool = False) -> Callable[[list[Sample]], list[float]]:
    """A reward that gives the first response token, and fails for the samples at `places`."""

    def score(samples: list[Sample]) -> list[float]:
        bad = [s.record["place"] in places for s in samples]
        if not nan and any(bad):
            raise KeyError("gold")
        return [math.nan if b else float(s.response_ids[0]) for b, s in zip(bad, samples, strict=True)]

    return score


def scored(function: Any, rollout: Rollout, on_error: OnError = SKIP[0]) -> Scores:
    return WeightedRewards([FunctionReward(function, name="judge")], on_errors=[on_error])(rollout)


@pytest.mark.parametrize("nan", [False, True], ids=["raises", "nan"])
def test_a_sample_that_cannot_be_scored_is_named_and_takes_no_part(nan: bool, capsys: Any) -> None:
    """Gradients, running statistics and metrics are those of a rollout without it."""
    whole = trajectories(records=PLACES)
    found, states, logged = [], [], []
    rest = [pair for i, pair in enumerate(whole.sequences()) if i != 2]
    others = [p for p in PLACES if p["place"] != 2]
    for rollout in (whole, Rollout.pack([p for p, _ in rest], [r for _, r in rest], records=others)):
        made = engine(ppo={"normalize_scores": True, "whiten_rewards": True})
        found.append(recorded_gradients(made))
        logged.append(made.update(made.score(rollout, scored(broken_for(2, nan=nan), rollout))))
        states.append(made.state()["moments"])
    assert largest_gap(*found) <= 1e-6 and states[0] == states[1]
    assert logged[0]["reward/judge/skipped"] == 1.0 == logged[0]["rollout/left_out"]
    assert logged[0]["objective/scores"] == pytest.approx(logged[1]["objective/scores"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and re.match("left out sample 2: reward 'judge' (raised KeyError|gave nan)", said[0])


def test_a_sample_left_alone_in_its_group_is_left_out_too() -> None:
    rollout = trajectories(group_ids=[0, 0, 1, 1, 2, 2, 3, 3], records=PLACES)
    scores = scored(broken_for(4, nan=True), rollout)
    left, of = only_scored(rollout, scores, grouped=True)
    assert left.group_ids.tolist() == [0, 0, 1, 1, 3, 3] and len(of.sequences) == 6
    made = engine(ppo={"advantage": "grpo"}, rollout={"samples_per_prompt": 2})
    assert made.update(made.score(rollout, scores))["rollout/left_out"] == 2.0


def test_too_few_scored_samples_are_an_error_and_change_nothing() -> None:
    made, rollout = engine(ppo={"num_minibatches": 4}), trajectories(records=PLACES)
    before = made.state()
    with pytest.raises(RewardError, match="only 3 of 8 samples can be trained on, and it takes 4; the first without a"):
        made.score(rollout, scored(broken_for(3, 4, 5, 6, 7, nan=True), rollout))
    assert made.state() == before


def test_a_rollout_keeps_the_chosen_sequences() -> None:
    masks = [[t % 3 != 1 for t in range(n)] for n in (5, 2, 9)]
    made = trajectories(
        ((3, 5), (1, 2), (6, 9)), loss_masks=masks, logprobs=[[-0.1 * t] * len(m) for t, m in enumerate(masks)]
    )
    kept = made.where(torch.tensor([True, False, True]))
    assert kept.sequences() == [made.sequences()[0], made.sequences()[2]]
    assert kept.action_counts.tolist() == [3, 6] and kept.logprobs is not None
    assert torch.equal(kept.logprobs, torch.tensor([0.0] * 3 + [-0.2] * 6)) and kept.group_ids.tolist() == [0, 2]


def test_a_reward_is_asked_again_and_counted(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("fastppo.endpoints.FIRST_WAIT", 0.0)
    answers: list[Any] = [KeyError("busy"), [math.nan] * 8, SCORES]

    def flaky(samples: list[Sample]) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    scores = scored(flaky, trajectories(), OnError("retry", 2))
    assert scores.sequences.tolist() == pytest.approx(SCORES) and scores.counts == {"reward/judge/retries": 2.0}
    assert capsys.readouterr().out.count("asking again (") == 2
    answers += [KeyError("busy")] * 2
    with pytest.raises(RewardError, match="raised KeyError: 'busy'"):
        scored(flaky, trajectories(), OnError("retry", 1))


def test_of_an_endpoint_the_batches_that_fail_are_left_out(serve: Any) -> None:
    def reply(samples: list[dict[str, Any]]) -> Any:
        return 500 if samples[0]["response_ids"] == second else {"scores": [1.0] * len(samples)}

    rollout = trajectories()
    second = rollout.sequences()[2][1]
    reward = HTTPReward(serve(reply).url, name="judge", batch_size=2, retries=0)
    scores = WeightedRewards([reward], on_errors=SKIP)(rollout)
    assert sorted(scores.missing) == [2, 3] and "HTTP Error 500" in scores.missing[2]


def test_a_reward_server_that_dies_in_a_run_ends_it_saved(serve: Any, tmp_path: Path) -> None:
    """Where it was told to skip as well: an iteration without any score is none. The run goes on when it is back."""
    asked: list[int] = []

    def reply(samples: list[dict[str, Any]]) -> Any:
        asked.append(len(samples))
        return "hang up" if len(asked) == 4 else {"scores": [float(len(s["response"])) for s in samples]}

    server = serve(reply)
    http = {"kind": "http", "target": server.url, "name": "judge", "retries": 0}
    undisturbed = {"rewards": [http], "train": {"eval_every": 9, "total_steps": 4}}
    for on_error in ("fail", "skip"):
        asked.clear()
        config = runs.config(
            tmp_path, **{**undisturbed, "rewards": [{**http, "on_error": on_error}]}, out=str(tmp_path / on_error)
        )
        with pytest.raises(RewardError, match="Remote end closed|only 0 of 4 samples can be trained on"):
            train(config)
        train(config, resume=LATEST)
        rows = runs.rows(tmp_path / on_error / "metrics.jsonl")
        assert [row["step"] for row in rows if "episode" in row] == [1, 2, 3, 4]


# --- numbers that are not finite ------------------------------------------------------------------------------------


def poison(made: PPOEngine, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in one logit, or in one entry of one gradient, of the policy."""
    if where == "a gradient":
        parameter = made.policy.get_parameter("model.layers.1.mlp.up_proj.weight")

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0] = math.nan
            return gradient

        monkeypatch.setattr(parameter, "_hook", parameter.register_hook(spoil), raising=False)
    else:
        from fastppo import update

        whole = update.linear_ppo_loss

        def with_a_nan(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
            return whole(torch.cat([hidden[:1] * math.nan, hidden[1:]]), *rest, **options)

        monkeypatch.setattr(update, "linear_ppo_loss", with_a_nan)


@pytest.mark.parametrize(
    ("where", "named"), [("a logit", "model.embed_tokens.weight"), ("a gradient", "1.mlp.up_proj")]
)
def test_a_nan_leaves_the_policy_as_it_is_and_is_named(where: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(ppo={"num_epochs": 2})
    poison(made, where, monkeypatch)
    experience = made.score(trajectories(), SCORES)
    before, critic = weights(made.policy), weights(made.critic)
    metrics = made.update(experience)
    assert equal_weights(weights(made.policy), before) and not any(made._policy.optimizer.state.values())
    assert not equal_weights(weights(made.critic), critic)  # which has nothing to do with it
    assert metrics["policy/skipped_steps"] == 2.0 and metrics["policy/steps"] == 0.0
    assert metrics["critic/skipped_steps"] == 0.0 and "policy/grad_norm" not in metrics
    (role, (count, why)), *others = made.skipped().items()
    assert (role, count, others) == ("policy", 2, []) and f"{named}" in why and "not finite" in why
    monkeypatch.undo()
    made.policy.get_parameter("model.layers.1.mlp.up_proj.weight")._backward_hooks = None
    assert made.update(made.score(trajectories(), SCORES))["policy/steps"] == 2.0 and made.skipped() == {}
    assert made.state()["roles"]["policy"] == [2, 2, 0]  # iterations, skipped steps, of these in a row
    assert all(bool(p.isfinite().all()) for p in made.policy.parameters())


def test_a_loss_that_is_not_finite_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every gradient is."""
    made = engine()
    for p in made.policy.parameters():
        p.grad = torch.ones_like(p)
    before = weights(made.policy)
    made._policy.step(torch.tensor(math.inf))
    assert equal_weights(weights(made.policy), before) and made.skipped() == {"policy": (1, "the loss is inf")}


def test_a_nan_in_one_reward_is_an_error_that_names_the_sample() -> None:
    made = engine()
    before = weights(made.policy)
    with pytest.raises(RewardError, match="gave nan for sample 3"):
        made.score(trajectories(), [*SCORES[:3], math.nan, *SCORES[4:]])
    assert equal_weights(weights(made.policy), before)


class Poisoned:
    """From iteration `first` on, for as many as `count`, every gradient of the policy is NaN."""

    def __init__(self, monkeypatch: Any, first: int, count: int) -> None:
        whole = PPOEngine.update

        def update(engine: PPOEngine, experience: Any) -> Any:
            on = first <= engine.iteration + 1 < first + count and self.left > 0
            self.left -= on
            advantages = experience.advantages
            if on:
                advantages[0] = math.nan
            return whole(engine, experience)

        self.left = count
        monkeypatch.setattr(PPOEngine, "update", update)


def test_too_many_skipped_steps_end_the_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    Poisoned(monkeypatch, 2, 9)
    ppo = {"num_epochs": 1, "num_minibatches": 1, "max_skipped_steps": 2}
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row were skipped .*Parameters are as they were"):
        train(runs.config(tmp_path, ppo=ppo, train={"total_steps": 6, "eval_every": 9}))
    said = capsys.readouterr().out
    assert "iteration 2: policy: step skipped, 1 in a row: " in said and "iteration 3: policy: step skipped, 2" in said


def test_skipped_steps_lead_back_to_the_last_good_checkpoint_once(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    ppo = {"num_epochs": 1, "num_minibatches": 1, "max_skipped_steps": 2, "on_max_skipped": "roll_back"}
    config = runs.config(tmp_path, ppo=ppo, train={"total_steps": 7, "eval_every": 9, "save_every": 1, "keep_last": 0})
    Poisoned(monkeypatch, 4, 2)
    folder = train(config)
    assert "are those of" in (said := capsys.readouterr().out) and "step-000003 again" in said
    rows = runs.rows(folder / "metrics.jsonl")
    assert [row["policy/steps"] for row in rows if "episode" in row] == [1, 1, 1, 0, 0, 1, 1]
    Poisoned(monkeypatch, 4, 9)
    with pytest.raises(NonFiniteError, match="no checkpoint before the first of them that was not tried already"):
        train(
            runs.config(
                tmp_path, ppo=ppo, train={"total_steps": 9, "eval_every": 9, "save_every": 1}, out=str(tmp_path / "b")
            )
        )


# --- odd responses, other machines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["penalty", "bootstrap", "mask", "none"])
@pytest.mark.parametrize("case", ["all cut", "all end at once", "all empty"])
def test_a_rollout_of_nothing_but_odd_responses_trains_or_does_nothing(case: str, truncation: str) -> None:
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    response, reason = {"all cut": ([3, 4, 5], "length"), "all end at once": ([7], "stop"), "all empty": ([], "stop")}[
        case
    ]
    made = engine(ppo={"truncation": truncation, "whiten_rewards": True, "num_epochs": 2})
    rollout = Rollout.pack(prompts, [response] * 4, finish_reasons=[reason] * 4)  # pyright: ignore
    before = weights(made.policy)
    metrics = made.update(made.score(rollout, [1.0, 2.0, 3.0, 4.0]))
    assert all(math.isfinite(x) for x in metrics.values()), metrics
    assert metrics["policy/skipped_steps"] == 0.0 and all(bool(p.isfinite().all()) for p in made.policy.parameters())
    nothing = case == "all empty" or (case == "all cut" and truncation == "mask")
    assert (metrics["policy/steps"] == 0) == nothing == equal_weights(weights(made.policy), before)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    config = runs.config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1"}\n' * 4 + f'{{"prompt": "{"1" * 200}"}}\n')
    with pytest.raises(ValueError, match="make 206 tokens, more than the model's context of 128: set data.max_prompt"):
        train(config)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Time-outs, progress and phases go by the monotonic clock."""
    import time

    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 1e9)
    folder = train(runs.config(tmp_path, train={"total_steps": 2, "save_every": 1}))
    rows = [row for row in runs.rows(folder / "metrics.jsonl") if "episode" in row]
    assert all(0 <= value < 60 for row in rows for name, value in row.items() if name.startswith("time/"))
    assert len(rows) == 2


@pytest.mark.parametrize("mask_all", [False, True])
def test_rewards_are_whitened_by_what_trains(mask_all: bool) -> None:
    """The deviation of responses that truncation = "mask" leaves out has no part in it."""
    cut = [i % 2 == 1 for i in range(8)]
    reasons: list[Any] = ["length" if c or mask_all else "stop" for c in cut]
    made = engine(ppo={"whiten_rewards": True, "truncation": "mask", "kl_coef": 0.0})
    rollout = trajectories(finish_reasons=reasons)
    one, other = (
        made.score(rollout, [s * (f if c else 1.0) for s, c in zip(SCORES, cut, strict=True)]) for f in (1, 9)
    )
    assert torch.isfinite(one.rewards).all()
    if not mask_all:
        assert torch.equal(one.rewards[one.mask], other.rewards[one.mask])
        live = one.rewards[one.mask].double()
        assert live.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-5)
