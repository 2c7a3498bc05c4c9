"""`fastppo plan` and the start of a run: what cannot run is refused alike, and what is free now is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from fastppo import RunConfig
from fastppo.checks import InputError
from fastppo.memory.plan import GIB
from fastppo.memory.start import check_start, plan_run
from fastppo.trainer import train
from test_memory import CUDA, plan_of, wide

ON_A_GPU: list[dict[str, Any]] = [
    {"offload": {"reference": "move"}},
    {"layers": {"checkpointing": "full", "offload_activations": True}},
    {"policy_optimizer": {"kind": "adamw-cpu-offload"}},
    {"critic_optimizer": {"kind": "adamw-cpu-offload"}},
]


@pytest.mark.parametrize("changes", ON_A_GPU, ids=str)
def test_what_a_cpu_cannot_run_is_refused_by_plan_as_by_train(changes: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is loaded; a plan for a GPU that is not here is made."""
    config: RunConfig = runs.config(tmp_path, data={"max_prompt_tokens": 16}, **changes)
    said = []
    for call in (lambda: plan_run(config, None), lambda: train(config)):
        with pytest.raises(InputError, match="'cpu'") as refused:
            call()
        said.append(str(refused.value))
    assert said[0] == said[1] and not (tmp_path / "run").exists()
    assert plan_run(config, "24GB")[0].fits


def test_responses_that_fill_the_context_are_refused_without_knowing_a_prompt(tmp_path: Path) -> None:
    context = plan_of(wide(tmp_path)).setting.policy.config.max_position_embeddings
    with pytest.raises(InputError, match=f"no room for a prompt in the policy's context of {context}"):
        plan_of(wide(tmp_path, rollout={"max_new_tokens": context}))


def test_no_prompt_is_planned_that_the_context_has_no_room_for(tmp_path: Path) -> None:
    longer = wide(tmp_path, data={"max_prompt_tokens": 10000}, rollout={"max_new_tokens": 96})
    work = plan_of(longer).setting.work
    assert work.prompt == 4000 and work.longest == 4096


@pytest.mark.parametrize("key", [{"lora_rank": 64}, {"lora_alpha": 8.0}, {"lora_targets": ["q_proj"]}], ids=str)
def test_keys_of_adapters_are_refused_where_there_are_none(key: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are of adapters: set memory.share = 'lora', or leave them out"):
        wide(tmp_path, memory=key)


def test_a_start_says_how_much_of_a_gpu_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process may have the rest."""
    run = wide(tmp_path, train={"async_save": False})
    needed = plan_of(run).needed
    for there, remark in ((needed, ""), (needed // 2, f", but only {needed // 2 / GIB:.1f} GiB are free now")):
        monkeypatch.setattr("fastppo.memory.start.memory_of", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, there=there: (there, needed))
        check_start(run, CUDA, 512)
        assert capsys.readouterr().out.endswith(f"GiB){remark}\n")
