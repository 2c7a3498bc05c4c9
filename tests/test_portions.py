"""What memory had room for is part of a run's state: sums in other portions round in another way."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from fastppo import PPOEngine, models, train
from fastppo.out_of_memory import Portion
from fastppo.resume import LATEST
from fastppo.rollout.decoder import Decoder
from test_checkpoint import assert_same_run, back_to

WHERE = {
    "memory/max_tokens_per_microbatch": ("update", models, "hidden_states"),
    "memory/max_rows": ("generate", Decoder, "_step"),
}


@pytest.mark.parametrize("key", WHERE)
def test_a_resumed_run_goes_on_in_the_portions_that_fitted(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from behind the iteration whose update or rollout ran out of memory."""
    phase, owner, work = WHERE[key]
    inner, original, due = getattr(PPOEngine, phase), getattr(owner, work), []

    def begin(made: PPOEngine, *args: Any, **kwargs: Any) -> Any:
        due[:] = [1] if made.iteration == 1 else []
        return inner(made, *args, **kwargs)

    def fail_once(*args: Any) -> Any:
        if due:
            due.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args)

    monkeypatch.setattr(PPOEngine, phase, begin)
    monkeypatch.setattr(owner, work, fail_once)
    config = runs.config(tmp_path, train={"total_steps": 4, "save_every": 1, "keep_last": 0, "eval_every": 9})
    undisturbed = train(config)
    logged = [row.get(key) for row in runs.rows(undisturbed / "metrics.jsonl") if "val/ratio" in row]
    assert len(logged) == 4 and logged[0] is None and logged[1] == logged[3] is not None
    shutil.copytree(undisturbed, tmp_path / "again")
    back_to(tmp_path / "again", 2)
    assert_same_run(undisturbed, train(replace(config, out=str(tmp_path / "again")), resume=LATEST))


def test_a_limit_that_was_changed_is_tried() -> None:
    """Larger or smaller than what the portions had come to; else they stay what they were."""
    portion = Portion(100, "tokens", "key")
    portion.size, portion.failures = 25, 2
    for limit, expected in ((100, [100, 25, 2]), (50, [50, 50, 0]), (200, [200, 200, 0])):
        other = Portion(limit, "tokens", "key")
        other.load(portion.state())
        assert other.state() == expected
