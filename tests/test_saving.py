"""What a run keeps: checkpoints beside training, the best one, the finished rollout; and what a full disk leaves."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import runs
from batches import equal_weights, weights
from fastppo import ModelConfig, PPOEngine, RewardError, checkpoint, kept_rollout, models, saving, train
from fastppo.resume import LATEST
from test_checkpoint import assert_same_run, config

NOISY = [{"kind": "function", "target": "runs:noisy"}]


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_holds_the_state_it_was_taken_of(tmp_path: Path, monkeypatch: Any) -> None:
    """However late the thread writes it while training goes on: bit for bit what is written when training waits."""
    write, update, trained = checkpoint.write, PPOEngine.update, threading.Semaphore(0)

    def late(folder: Path, *args: Any) -> None:
        if folder.name in ("step-000002", "step-000004"):
            assert trained.acquire(timeout=60)  # another iteration changed the weights
        write(folder, *args)

    def told(engine: PPOEngine, experience: Any) -> Any:
        stats = update(engine, experience)
        if engine.iteration in (3, 5):
            trained.release()
        return stats

    waits = train(config(tmp_path, out=str(tmp_path / "waits"), train={"async_save": False}))
    monkeypatch.setattr(checkpoint, "write", late)
    monkeypatch.setattr(PPOEngine, "update", told)
    aside = train(config(tmp_path, out=str(tmp_path / "aside"), train={"async_save": True}))
    for name in ("step-000002", "step-000004", "final"):
        for file in ("state.safetensors", "policy/model.safetensors", "critic/model.safetensors"):
            a, b = (load_file(folder / "checkpoints" / name / file) for folder in (waits, aside))
            assert a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items()), (name, file)


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """An iteration is finished while the checkpoint before it is being written."""
    write, others, seen = checkpoint.write, threading.Event(), []

    def until_another_iteration(folder: Path, *args: Any) -> None:
        if folder.name == "step-000002":
            seen.append(others.wait(30))
        write(folder, *args)

    update = PPOEngine.update

    def counted(engine: PPOEngine, experience: Any) -> Any:
        stats = update(engine, experience)
        if engine.iteration == 3:
            others.set()
        return stats

    monkeypatch.setattr(checkpoint, "write", until_another_iteration)
    monkeypatch.setattr(PPOEngine, "update", counted)
    train(config(tmp_path, train={"keep_rollouts": False}))
    assert seen == [True]


def test_tied_weights_are_copied_and_written_once() -> None:
    shared = torch.randn(3, 4)
    made = saving._in_host_memory({"a": shared, "b": shared, "c": shared[:2]}, {})
    assert made["a"] is made["b"] and made["a"] is not shared and torch.equal(made["c"], shared[:2])
    shared.zero_()
    assert made["a"].abs().sum() > 0


def test_a_failed_write_is_said_at_the_next_iteration_and_leaves_the_run(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    undisturbed = train(config(tmp_path))
    save_file, there = checkpoint.save_file, config(tmp_path, out=str(tmp_path / "full"))

    def full_at_four(tensors: Any, path: Path) -> None:
        if "step-000004" in str(path):
            full()
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_at_four)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot write the checkpoint .*step-000004: .*No space left"):
        train(there)
    monkeypatch.undo()
    folder = tmp_path / "full" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"step-000002", "interrupted"}
    assert checkpoint.read(folder / "step-000002").step == 2
    assert 4 <= checkpoint.read(folder / "interrupted").step <= 5
    assert_same_run(undisturbed, train(there, resume=LATEST))


def test_the_last_write_is_waited_for_when_the_run_fails(tmp_path: Path, monkeypatch: Any) -> None:
    write = checkpoint.write

    def late(*args: Any) -> None:
        time.sleep(0.3)
        write(*args)

    monkeypatch.setattr(checkpoint, "write", late)
    runs.calls.clear()
    monkeypatch.setattr(runs, "fails_at", 3)
    with pytest.raises(RewardError):
        train(config(tmp_path, train={"save_every": 1}))
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-000001", "step-000002", "interrupted"}
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_the_best_state_is_kept_and_survives_a_resume(tmp_path: Path, monkeypatch: Any) -> None:
    """The state of the evaluation with the highest score, in a run that was killed at any checkpoint too."""
    scores = iter([0.0, 5.0, 2.0, 3.0])
    changed = {"keep_best": True, "eval_every": 2, "save_every": 1}
    monkeypatch.setattr(runs, "digits", lambda samples: [next(scores) if len(samples) == 6 else 1.0] * len(samples))
    digits = [{"kind": "function", "target": "runs:digits"}]
    folder = train(config(tmp_path, rewards=digits, train=changed)) / "checkpoints"
    best = checkpoint.read(folder / "best")
    assert best.step == 2 and best.numbers["best"] == 5.0
    a, b = (load_file(folder / name / "state.safetensors") for name in ("best", "step-000002"))
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    for path in folder.iterdir():
        if path.name not in ("best", "step-000003"):
            shutil.rmtree(path)
    scores = iter([2.0, 3.0])
    train(config(tmp_path, rewards=digits, train=changed), resume=LATEST)
    assert checkpoint.read(folder / "best").step == 2


def counted(monkeypatch: Any) -> list[int]:
    """How many training rollouts were drawn."""
    drawn, generate = [], PPOEngine.generate

    def count(engine: PPOEngine, prompts: Any, sampling: Any = None, *rest: Any) -> Any:
        drawn.extend([engine.iteration] * (sampling is None))
        return generate(engine, prompts, sampling, *rest)

    monkeypatch.setattr(PPOEngine, "generate", count)
    return drawn


@pytest.mark.parametrize("moment", ["reward", "score"])
def test_a_finished_rollout_is_not_drawn_again(moment: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Nor are scores that were there asked for again, and the run is the undisturbed one, bit for bit."""
    undisturbed = train(config(tmp_path))
    failing = config(tmp_path, out=str(tmp_path / "failed"), train={"save_every": 0})
    runs.calls.clear()
    if moment == "reward":
        monkeypatch.setattr(runs, "fails_at", 3)
    else:
        whole = PPOEngine.score

        def fails(engine: PPOEngine, *args: Any) -> Any:
            if engine.iteration == 2:
                raise RuntimeError("out of memory")
            return whole(engine, *args)

        monkeypatch.setattr(PPOEngine, "score", fails)
    with pytest.raises(RuntimeError):
        train(failing)
    monkeypatch.undo()
    monkeypatch.setattr(runs, "fails_at", None)
    drawn, asked = counted(monkeypatch), len(runs.calls)
    again = train(failing, resume=LATEST)
    what = "rollout" if moment == "reward" else "rollout and scores"
    assert f"took the {what} of iteration 3 that was finished" in capsys.readouterr().out
    assert drawn == [3, 4, 5] and len(runs.calls) - asked == 3 + 2 + (moment == "reward")
    assert_same_run(undisturbed, again)


@pytest.mark.parametrize("damage", ["other state", "damaged", "switched off"])
def test_a_rollout_that_does_not_follow_the_state_is_not_taken(damage: str, tmp_path: Path, monkeypatch: Any) -> None:
    train(config(tmp_path))
    folder, kept = tmp_path / "run", tmp_path / "run" / "rollouts" / "rank-0"
    assert checkpoint.read(kept).numbers["follows"]
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-000004":
            shutil.rmtree(path)
    if damage == "other state":
        shutil.rmtree(folder / "checkpoints")
        train(config(tmp_path, out=str(tmp_path / "again")))
        shutil.copytree(tmp_path / "again" / "checkpoints" / "step-000004", folder / "checkpoints" / "step-000004")
    if damage == "damaged":
        content = (kept / "state.safetensors").read_bytes()
        (kept / "state.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    drawn = counted(monkeypatch)
    train(config(tmp_path, train={"keep_rollouts": damage != "switched off"}), resume=LATEST)
    assert drawn == [4, 5]


def test_a_kept_rollout_holds_everything(tmp_path: Path) -> None:
    """Token scores, several samples of a prompt, records that are no JSON: they are those of the prompts."""
    from types import SimpleNamespace

    from batches import engine, prompts
    from fastppo import Scores

    made = engine(rollout={"samples_per_prompt": 2, "stop_sequences": ((3, 4),)})
    drawn = made.generate(prompts(4))
    scores = Scores(torch.randn(8), torch.randn(int(drawn.loss_mask.sum())), {"a": torch.randn(8)}, {}, {"n": 2.0})
    config = SimpleNamespace(train=SimpleNamespace(keep_rollouts=True))
    state = {"saved": True, "kept": None, "boundary": {"id": "x"}, "rollouts": SimpleNamespace(is_ahead=False)}
    run: Any = SimpleNamespace(folder=tmp_path, engine=made, config=config, **state)
    kept_rollout._keep(run, drawn, scores)
    found = kept_rollout.find(run)
    assert found is not None
    again, back = found.rollout(prompts(4)), found.scores()
    assert again.sequences() == drawn.sequences() and torch.equal(again.logprobs, drawn.logprobs)  # pyright: ignore
    assert (again.sampling, again.exact, again.finish_reasons) == (drawn.sampling, drawn.exact, drawn.finish_reasons)
    assert back is not None and torch.equal(back.tokens, scores.tokens) and back.counts == {"n": 2.0}  # pyright: ignore
    assert torch.equal(back.sequences, scores.sequences) and torch.equal(back.parts["a"], scores.parts["a"])


def test_an_evaluation_that_is_not_made_again_stays_logged(tmp_path: Path) -> None:
    """eval_every may change between a run and its continuation."""
    folder = train(config(tmp_path, train={"eval_every": 4}))
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-000004":
            shutil.rmtree(path)
    train(config(tmp_path, train={"eval_every": 5}), resume=LATEST)
    steps = [row["step"] for row in runs.rows(folder / "metrics.jsonl") if "eval/scores" in row]
    assert steps == [0, 4, 5, 6]
    assert {row["step"] for row in runs.rows(folder / "samples.jsonl")} == {0, 4, 5, 6}


def test_a_saved_model_has_the_dropout_it_came_with(tmp_path: Path) -> None:
    """It is off while PPO trains, which is nobody else's business; the critic made from it too."""
    raw = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                    attention_dropout=0.125)
    )  # fmt: skip
    raw.save_pretrained(tmp_path / "raw")
    policy = models.load_policy(ModelConfig(path=str(tmp_path / "raw")))
    assert policy.config.attention_dropout == 0.0
    PPOEngine(policy).save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy")
    assert again.config.attention_dropout == 0.125 and equal_weights(weights(again), weights(raw))
    assert '"attention_dropout": 0.125' in (tmp_path / "saved" / "critic" / "config.json").read_text()
    assert policy.config.attention_dropout == 0.0
