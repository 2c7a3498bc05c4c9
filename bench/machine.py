"""The machine: how long a call takes on it, how fast it copies and multiplies, and what it is."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastppo_kernels.linear import product, runs_onednn

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "verl", "flash-attn", "transformers")


def seconds_per_call(run: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds per call. On a GPU the first is between two CUDA events, the second NaN."""
    if device != "cpu":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls, math.nan
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: a call replays its kernels and pays neither Python nor its launches.

    Raises:
        RuntimeError: `run` waits for the device, or does something else that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call allocates or compiles must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@cache
def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy of a large tensor: the median of ten, as variants are timed."""
    size = (1 << 30) if device != "cpu" else (1 << 28)
    x, y = torch.ones(2, size // 4, dtype=torch.float32, device=device)
    return 2 * size / _median_seconds(lambda: y.copy_(x), device)


@cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large product of random matrices, the median of ten, by the faster library."""
    n = 8192 if device != "cpu" else 1536
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if runs_onednn(a):
        ways.append(lambda: product(a, b))
    return 2 * n**3 / min(_median_seconds(way, device) for way in ways)


def _median_seconds(run: Callable[[], object], device: str) -> float:
    """Of ten calls, after one that warms up."""
    run()
    return statistics.median(seconds_per_call(run, 1, device)[0] for _ in range(10))


@cache
def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    here = Path(__file__).parent
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": subprocess.run(git, cwd=here, capture_output=True, text=True, check=False).stdout.strip(),
        "copy_gb_per_s": round(copy_rate(device) / 1e9, 2),
        "matmul_gflop_per_s": {
            str(dtype).removeprefix("torch."): round(matmul_rate(device, dtype) / 1e9, 1)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
