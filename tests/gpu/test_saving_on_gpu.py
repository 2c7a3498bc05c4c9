"""Checkpoints that a thread writes while a GPU trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from adapters import adapted
from fastppo import models, train

pytestmark = pytest.mark.gpu


def test_a_checkpoint_of_adapters_is_written_beside_training(tmp_path: Path) -> None:
    """The last one of the thread is what the run writes at its end, when it waits."""
    pytest.importorskip("peft")
    lora = {"share": "lora", "lora_rank": 4}
    every = {"total_steps": 3, "save_every": 1, "keep_last": 0}
    done = train(runs.config(tmp_path, device="cuda", memory=lora, train=every))
    folders = [done / "checkpoints" / name for name in ("step-000001", "step-000003", "final")]
    for file in ("policy/model.safetensors", "policy/adapter/adapter_model.safetensors", "critic/model.safetensors"):
        first, last, final = (load_file(folder / file) for folder in folders)
        assert last.keys() == final.keys() and all(torch.equal(x, final[name]) for name, x in last.items()), file
        assert not all(torch.equal(x, last[name]) for name, x in first.items()), file


def test_merging_takes_no_memory_of_the_device() -> None:
    pytest.importorskip("peft")
    policy = models.to_device(adapted(moved=True), torch.device("cuda"))
    expected = models.plain_weights(models.to_device(adapted(moved=True), torch.device("cpu")))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merged = models.plain_weights(policy)
    assert torch.cuda.max_memory_allocated() == before
    assert all(torch.equal(x.cpu(), expected[name]) for name, x in merged.items())
