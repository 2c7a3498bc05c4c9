"""A plan is an upper bound where lengths differ: what a micro-batch, a prefill or a reward model may be filled with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Gemma2Config, LlamaConfig, PreTrainedConfig

import runs
from fastppo import attention
from fastppo.memory.load import Load
from fastppo.memory.passes import Model, forward, gradient
from fastppo.memory.plan import Work, make_plan
from fastppo.memory.setting import setting_of
from fastppo.trainer import train
from test_memory import CPU, CUDA, plan_of, wide

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


def _critic(shape: Callable[..., PreTrainedConfig], dtype: str, device: torch.device, **others: Any) -> Model:
    config = shape(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8, head_dim=16,
        num_key_value_heads=2, **others,
    )  # fmt: skip
    return Model(config=config, kind="critic", dtype=dtype, device=device)


def test_scores_are_planned_where_attention_has_a_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's FlashAttention has none, so each layer keeps float32 scores of every pair; the package has one."""
    load = Load(2, 192, 64)
    scores = 3 * 2 * 8 * 256**2 * 4  # layers, sequences, heads, pairs
    sizes = []
    for there in (False, True):
        monkeypatch.setattr(attention, "HAS_FLASH_ATTN", there)
        model = _critic(Gemma2Config, "bfloat16", CUDA, attn_logit_softcapping=50.0 + there)  # plans are remembered
        sizes.append(gradient(model, load, accumulates=False).total())
    assert sizes[0] > sizes[1] + scores


def test_keys_and_values_of_all_heads_are_planned_where_a_gpu_has_no_flash_attention() -> None:
    load = Load(2, 192, 64)
    gpu, cpu = (_critic(LlamaConfig, "float32", device) for device in (CUDA, CPU))
    more = gradient(gpu, load, accumulates=False).total() - gradient(cpu, load, accumulates=False).total()
    assert more >= 3 * 2 * 512 * (8 - 2) * 16 * 4  # layers, keys and values, tokens, heads, D, float32
    assert forward(gpu, load).total() < gradient(gpu, load, accumulates=False).total()


def test_a_critic_made_from_a_reward_model_has_its_dtype(tmp_path: Path) -> None:
    classifier = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    rewards = {dtype: [{"kind": "model", "target": classifier, "dtype": dtype}] for dtype in ("float32", "bfloat16")}
    parts = {
        dtype: plan_of(wide(tmp_path, rewards=rewards[dtype], critic={"init": "reward"})).phases[0].parts
        for dtype in rewards
    }
    sizes = {dtype: parts[dtype]["critic weights"] for dtype in parts}
    assert sizes["float32"] == pytest.approx(2 * sizes["bfloat16"], rel=0.01)  # but for the head
    assert sizes["float32"] == pytest.approx(parts["float32"]["reward weights"], rel=0.01)


def test_an_evaluation_of_more_and_longer_prompts_than_an_iterations_is_planned(tmp_path: Path) -> None:
    """In the rollout and in the reward, which it goes through, and nowhere else."""
    classifier = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    run = wide(
        tmp_path,
        rewards=[{"kind": "model", "target": classifier, "batch_size": 256}],
        data={"prompts": "none.jsonl", "max_prompt_tokens": 512, "eval_prompts": "none.jsonl"},
        rollout={"num_prompts": 8, "kv_gib": 100.0},
    )
    settings = [setting_of(run, CUDA, evaluation=x) for x in ((0, 0), (8, 512), (256, 512), (8, 1024))]
    none, same, more, longer = ({p.name: p.total for p in make_plan(x).phases} for x in settings)
    assert none == same
    for larger in (more, longer):
        assert [name for name in none if larger[name] > none[name]] == ["rollout", "reward"]
    assert make_plan(setting_of(run, CUDA)).phases == make_plan(settings[2]).phases  # of prompts that nobody has read
    assert settings[2].work.eval_sequences == 256 == setting_of(run, CUDA, evaluation=(999, 512)).work.eval_sequences


def test_a_start_plans_the_evaluation_it_will_make(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}="}) for i in range(40)) + "\n", encoding="utf-8")
    made = [runs.config(tmp_path, data={"eval_prompts": x}, train={"total_steps": 1}) for x in (None, str(held_out))]
    needed = []
    for place, config in enumerate(made):
        folder = train(replace(config, out=str(tmp_path / f"run{place}")))
        needed.append(json.loads((folder / "plan.json").read_text())["phases"]["rollout"]["total"])
    assert needed[1] > needed[0]
