"""Two ranks that hold half the sequences each do what one rank with all of them does."""

import importlib.util
import multiprocessing
import os
from typing import Any

import pytest
import torch

import tiny
from batches import (
    LENGTHS,
    SCORES,
    assert_same_numbers,
    engine,
    largest_gap,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import Rollout, models
from fastppo.config import MemoryConfig

FAR: dict[str, Any] = {"kl_coef": 0.3, "num_epochs": 2}
CASES: dict[str, dict[str, Any]] = {
    "gae": FAR,
    "gae, sequence means": {**FAR, "aggregation": "seq-mean-token-mean", "truncation": "bootstrap"},
    "gae, masked": {**FAR, "truncation": "mask", "whiten_rewards": True},
    "normalised scores": {**FAR, "normalize_scores": True, "clip_scores": 1.5},
    "adaptive kl": {**FAR, "kl_target": 0.01, "kl_horizon": 80},
    "kl in the loss": {**FAR, "kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01, "advantage": "reinforce++"},
    "groups": {**FAR, "advantage": "rloo", "aggregation": "constant"},
    "early stop": {**FAR, "num_epochs": 5, "target_kl": 1e-5, "roll_back": True},
    "micro-batches": {**FAR, "max_tokens_per_microbatch": 16},
}
if importlib.util.find_spec("peft") is not None:
    CASES["adapters on one base"] = FAR
CUT = ("stop", "length", "stop", "stop", "length", "length", "stop", "stop")


def part(rank: int, ranks: int, seed: int) -> tuple[Rollout, list[float]]:
    """Every rank's sequences: unequal in length, equal in number. A gap to the sampler is there to be logged."""
    whole = trajectories(seed=seed)
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    rows, groups = whole.sequences()[mine], [0, 0, 1, 1, 2, 2, 3, 3][mine]
    sampled = [[-1.0 - 0.1 * t for t in range(n)] for _, n in LENGTHS[mine]]
    prompts, responses = [p for p, _ in rows], [r for _, r in rows]
    rollout = Rollout.pack(prompts, responses, finish_reasons=CUT[mine], group_ids=groups, logprobs=sampled)
    return rollout, SCORES[mine]


def run(case: str, rank: int, ranks: int) -> dict[str, Any]:
    """Three iterations; what is left of them."""
    policy = tiny.policy(seed=1)
    made = engine(
        models.adapt(policy, MemoryConfig(lora_rank=4)) if case == "adapters on one base" else policy,
        reference=tiny.policy(seed=2),
        ppo=CASES[case],
        rollout={"old_logprobs": "recompute"},
        seed=1 + 7 * rank,  # ranks permute differently
    )
    made = made if made.critic is None else with_random_head(made)
    logged = [made.update(made.score(*part(rank, ranks, seed))) for seed in range(3)]
    roles = [made.policy] if made.critic is None else [made.policy, made.critic]
    moments = (made.moments.count, made.moments.mean, made.moments.std)
    return {"logged": logged, "weights": [weights(m) for m in roles], "kl": made.kl.coef, "moments": moments}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save({case: run(case, rank, 2) for case in CASES}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes made of all the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(folder)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert "RANK" not in os.environ
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_weights_of_one(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """CORRECTNESS C6."""
    expected = run(case, 0, 1)["weights"]
    for rank in two_ranks:
        for made, wanted in zip(rank[case]["weights"], expected, strict=True):
            assert largest_gap(made, wanted) <= 2e-6


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_weights_bit_for_bit(case: str, two_ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[case]["weights"] for rank in two_ranks)
    assert all(largest_gap(a, b) == 0 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_log_the_numbers_of_one(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """CORRECTNESS C6, P16: means over all sequences and tokens, not means of means."""
    expected = run(case, 0, 1)["logged"]
    for rank in two_ranks:
        for made, wanted in zip(rank[case]["logged"], expected, strict=True):
            assert_same_numbers(made, wanted, 1e-5)


def test_running_moments_are_those_of_the_scores_of_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    """CORRECTNESS C9."""
    for rank in two_ranks:
        count, mean, std = rank["normalised scores"]["moments"]
        scores = torch.tensor(SCORES, dtype=torch.float64)
        assert count == 24
        assert mean == pytest.approx(float(scores.mean()), abs=1e-6)
        assert std == pytest.approx(float(scores.std(correction=0)), abs=1e-6)


def test_the_kl_controller_counts_the_responses_of_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    expected = run("adaptive kl", 0, 1)["kl"]
    assert expected != 0.3
    assert [rank["adaptive kl"]["kl"] for rank in two_ranks] == pytest.approx([expected] * 2, rel=1e-6)
