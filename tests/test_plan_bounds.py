"""A plan is an upper bound where lengths differ: what a micro-batch, a prefill or a reward model may be filled with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.memory.passes import Load
from fastppo.memory.plan import Work
from test_memory import CPU

WORK = Work(sequences=24, minibatch=24, prompt=239, response=16, max_tokens=500, max_rows=24, kv_bytes=None)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sequences_of_uneven_lengths_take_no_more_than_was_planned(index: int, cases: Any, tmp_path: Path) -> None:
    """2 % for what a plan leaves out, and an update takes most of what was planned."""
    case = cases.UNEVEN[index]
    if case.share == "lora":
        pytest.importorskip("peft")
    run = cases.config(case, tmp_path)
    used, phases = cases.measured(run, case), cases.planned(run).phases
    for phase in phases:
        assert used[phase.name].peak <= 1.02 * phase.total, phase
    assert used["update"].peak >= 0.85 * phases[-1].total


def test_a_full_micro_batch_has_as_many_tokens_as_it_may() -> None:
    load, more = WORK.micro(24)
    assert (load, load.tokens, more) == (Load(1, 239, 16, tail=245), 500, True)
    assert WORK.micro(1) == (Load(1, 239, 16), False)
    batch = load.batch(CPU)
    assert batch.packing.cu_seqlens.tolist() == [0, 255, 500] and batch.position_ids[[254, 255]].tolist() == [254, 0]
    assert batch.rows.tolist() == [*range(238, 254), *range(483, 499)]  # 16 actions each, of the states before them


def test_a_micro_batch_on_the_cpu_is_padded_as_it_will_be() -> None:
    load = Load(1, 239, 16, tail=244)  # 499 tokens
    assert load.batch(CPU).packing.padding == 496 + 16 - 499 and load.batch(torch.device("cuda")).packing.padding == 0
