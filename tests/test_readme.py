"""The README's code runs as printed, and its measurements are those of the committed files."""

import re
from pathlib import Path
from typing import Any

from fastppo.bench import pages, records

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[str]:
    return re.findall(r"<!-- tests/test_readme.py runs this -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_embedding_example_runs(capsys):
    code, _ = examples()
    assert code.count("\n") <= 22
    exec(compile(code, str(README), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert all(float(x) == float(x) for line in lines for x in line.split())


def test_the_kernel_example_is_the_surrogate_at_ratio_one(capsys):
    _, code = examples()
    names = {}
    exec(compile(code, str(README), "exec"), names)
    loss, clipped = map(float, capsys.readouterr().out.split())
    assert abs(loss + float(names["advantages"].mean())) < 1e-6 and clipped == 0


EPYC, OTHER_EPYC = "2 x AMD EPYC", "2 x AMD EPYC (family 25, model 17)"


def newest(file: str, op: str, device: str = EPYC, **setting: Any) -> dict[str, dict[str, Any]]:
    """The last record of every variant on a device."""
    found = pages.newest(records.read(README.parent / "bench" / "results" / file))
    here = (r for r in found if r["machine"]["device"] == device)
    mine = (r for r in here if r["op"] == op and setting.items() <= r["setting"].items())
    return {r["variant"].split()[0]: r for r in mine if "skipped" not in r}


def test_its_measurements_are_the_committed_ones() -> None:
    text = README.read_text()
    speed = newest("cpu-end-to-end.jsonl", "ppo_iteration")
    reward = newest("cpu-end-to-end.jsonl", "ppo_reward", OTHER_EPYC)
    ours, trl = speed["fastppo"], speed["TRL"]
    assert f"| {ours['median_ms'] / 1e3:.2f} s; TRL 1.12.0's `PPOTrainer` {trl['median_ms'] / 1e3:.2f} s" in text
    assert f"{trl['times_fastppo']:.2f} times as long by the median" in text
    assert f"commit {ours['machine']['commit']}, {len(ours['medians_ms'])} runs of each | " in text
    assert f"{ours['machine']['matmul_float32_gflop_per_s']:.0f} GFLOP/s in float32 products" in text
    other = newest("cpu-end-to-end.jsonl", "ppo_iteration", OTHER_EPYC)
    times = f"{other['fastppo']['median_ms'] / 1e3:.2f} s; TRL {other['TRL']['median_ms'] / 1e3:.2f} s"
    runs = f"commit {other['TRL']['machine']['commit']}, {len(other['TRL']['medians_ms'])} runs of each"
    rate = f"({other['fastppo']['machine']['matmul_float32_gflop_per_s']:.0f} GFLOP/s)"
    assert f"{rate}, {runs} | {times}, {other['TRL']['times_fastppo']:.2f} times as long; " in text
    before = [
        r["times_fastppo"]
        for r in records.read(README.parent / "bench" / "results" / "cpu-end-to-end.jsonl")
        if r["op"] == "ppo_iteration" and r["machine"]["device"] == OTHER_EPYC and r["variant"].startswith("TRL")
    ][:-1]
    assert f"{min(before):.2f} to {max(before):.2f} times" in text, "the other runs there are not hidden"
    assert f"| {ours['peak_extra_mb']:.0f} MB; TRL {trl['peak_extra_mb']:.0f} MB |" in text
    ends = [f"{reward[name]['reward_last']:.3f} +- {reward[name]['reward_sd']:.3f}" for name in ("fastppo", "TRL")]
    assert f"{len(reward['TRL']['rewards'])} seeds | {ends[0]}; TRL {ends[1]} |" in text
    rows = newest("cpu-kernels.jsonl", "logits_ppo_loss", V=151936, dtype="float32", entropy=False)
    assert (
        f"| {rows['fastppo']['median_ms']:.0f} ms; `torch.compile` {rows['torch.compile']['times_fastppo']:.1f}" in text
    )
    assert f"eager PyTorch {rows['torch']['times_fastppo']:.1f} times as long" in text
