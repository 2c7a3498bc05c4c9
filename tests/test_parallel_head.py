"""A vocabulary split over two ranks gives the loss, the log-probs and the gradients of the whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from fastppo_kernels import linear_ppo_loss, token_logprobs

R, H, V, RANKS = 19, 6, 12, 2
CASES = [
    {},
    {"temperature": 0.6, "softcap": 5.0, "entropy_coef": 0.1, "kl_coef": 0.2, "chunk_size": 8},
    {"offset": 1e4, "temperature": 0.6},
    {"masked": True, "entropy_coef": 0.1},
]


def inputs(dtype: torch.dtype, case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "hidden": torch.randn(R, H, dtype=torch.float64), "weight": torch.randn(V, H, dtype=torch.float64),
        "bias": torch.randn(V, dtype=torch.float64) + case.get("offset", 0.0),
    }  # fmt: skip
    if case.get("masked"):
        made["bias"][V // RANKS :] = -torch.inf  # all of the second rank's columns
    made = {name: x.to(dtype) for name, x in made.items()}
    targets = [0, 5, 3, 2, 4, 1, 5] if case.get("masked") else [0, 11, 6, 5, 9, 3, 7]
    made["targets"] = torch.tensor(targets).repeat(3)[:R]
    weights = torch.tensor([0.1, 0.0, 0.3, 0.1, 0.2, 0.2, 0.1]).repeat(3)[:R]
    made["rows"] = [torch.rand(R).sub(2.0), torch.randn(R), weights]
    made["ref"] = torch.rand(R).sub(2.0)
    return made


def run(given: dict[str, Any], case: dict[str, Any], group: Any = None, rank: int | None = None) -> list[Tensor]:
    """Loss, log-probs, entropies and all gradients; of one rank's share of weight and bias if `rank` is given."""
    settings = {k: v for k, v in case.items() if k not in ("offset", "masked")}
    head = {k: v for k, v in settings.items() if k in ("temperature", "softcap", "chunk_size")}
    share = slice(None) if rank is None else slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    leaves = [given["hidden"].clone(), given["weight"][share].clone(), given["bias"][share].clone()]
    h, w, b = (x.requires_grad_() for x in leaves)
    loss, stats = linear_ppo_loss(
        h,
        w,
        given["targets"],
        *given["rows"],
        bias=b,
        ref_logprobs=given["ref"],
        with_entropy=True,
        group=group,
        **settings,
    )
    gradients = torch.autograd.grad(2.0 * loss, (h, w, b))
    logprobs, entropy = token_logprobs(h, w, given["targets"], bias=b, return_entropy=True, group=group, **head)
    more = torch.autograd.grad((logprobs * given["rows"][1]).sum() + 0.3 * entropy.sum(), (h, w, b))
    made = (loss, stats["clip_count"], stats["entropy_sum"], logprobs, entropy, *gradients, *more)
    return [x.detach() for x in made]  # a graph would hold the process group beyond its end


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = [
        run(inputs(dtype, case), case, torch.distributed.group.WORLD, rank)
        for dtype in (torch.float64, torch.float32)
        for case in CASES
    ]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Tensor]]]:
    """What each rank found, [rank][case]."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(on_one_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_ranks_give_what_one_gives(dtype: torch.dtype, case: int, split: list[list[list[Tensor]]]) -> None:
    place = case + len(CASES) * (dtype == torch.float32)
    whole = run(inputs(torch.float64, CASES[case]), CASES[case])
    for number, truth in enumerate(whole):
        parts = [split[rank][place][number].double() for rank in range(RANKS)]
        sharded = truth.shape[:1] == (V,)
        joined = torch.cat(parts) if sharded else parts[0]
        if not sharded:
            assert torch.equal(parts[0], parts[1]), "every rank has the same bits"
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6 * max(1.0, CASES[case].get("offset", 0.0) ** 0.5)
        atol = tolerance * max(1.0, float(truth.abs().max()))  # an element is a sum of others
        torch.testing.assert_close(joined, truth.double(), atol=atol, rtol=tolerance * 10, msg=f"output {number}")
