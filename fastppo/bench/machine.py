"""The machine: how long a call takes on it, how fast it copies and multiplies, and what it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastppo
from fastppo_kernels import native
from fastppo_kernels.linear import runs_native

PACKAGES = (
    *("torch", "triton", "transformers", "liger-kernel", "trl", "verl", "openrlhf", "agilerl", "flash-attn"),
    *("accelerate", "datasets", "numpy"),
)
GIT = ["git", "describe", "--always", "--exclude", "*"]
CHANGES = ["git", "diff", "HEAD", "--", ".", ":!bench/results", ":!docs"]  # results do not change what is measured
UNKNOWN = "unknown"  # commit
ROOT = Path(__file__).resolve().parent.parent.parent


def seconds_per_call(
    run: Callable[[], object], calls: int, device: str, before: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """(wall, CPU) seconds per call, without `before`, which runs before each.

    On a GPU the first is between two CUDA events, the second NaN.
    """
    if device != "cpu":
        return _seconds_on_gpu(run, calls, before), math.nan
    wall = cpu = 0.0
    for _ in range(calls):
        before()
        wall_before, cpu_before = time.perf_counter(), time.process_time()
        run()
        wall += time.perf_counter() - wall_before
        cpu += time.process_time() - cpu_before
    return wall / calls, cpu / calls


def _seconds_on_gpu(run: Callable[[], object], calls: int, before: Callable[[], object]) -> float:
    """The device is waited for once, at the end: while it works on what is before a call, Python launches the call."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(calls)]
    for begin, end in events:
        before()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / calls


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
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception:
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        _out_of_capture(pool)
        raise
    return graph.replay


def _out_of_capture(pool: Any) -> None:
    """A capture that cannot be ended leaves the allocator in its pool and the generator in the capture.

    Memory of later calls would be taken from the pool and never given back, and the next random tensor is refused.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # of one that could be ended, the allocator has been told
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    fresh = torch.Generator("cuda").manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def copy_rate(device: str, threads: int | None = None) -> float:
    """Bytes read and written per second by a copy of a large tensor: the median of ten, as variants are timed.

    Args:
        threads: of the CPU; None: as many as torch has now.
    """
    return _copy_rate(device, threads or torch.get_num_threads())


@cache
def _copy_rate(device: str, threads: int) -> float:
    size = (1 << 30) if device != "cpu" else (1 << 28)
    x, y = torch.ones(2, size // 4, dtype=torch.float32, device=device)
    with _on_threads(threads):
        return 2 * size / _median_seconds(lambda: y.copy_(x), device)


def matmul_rate(device: str, dtype: torch.dtype, threads: int | None = None) -> float:
    """Operations per second of a large product of random matrices, the median of ten, by the fastest library."""
    return _matmul_rate(device, dtype, threads or torch.get_num_threads())


@cache
def _matmul_rate(device: str, dtype: torch.dtype, threads: int) -> float:
    n = 8192 if device != "cpu" else 1536
    a, b = torch.randn(2, n, n, device=device, generator=_own_generator(device)).to(dtype)
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if a.dtype == torch.float32 and runs_native(a, b):
        ways.append(lambda: native.matmul(a, b))
    if a.dtype == torch.float32 and not a.is_cuda and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # oneDNN, which is not behind `@`; bfloat16 is, and where a CPU has no products of it, refuses them here
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with _on_threads(threads):
        return 2 * n**3 / min(_median_seconds(way, device) for way in ways)


def yardstick(device: str) -> Callable[[], dict[str, Any]]:
    """A few milliseconds of products that no commit changes: rounds time it to tell a slow machine.

    On a CPU they stay in a core's cache. What goes through memory varies by more than any op, and divided by it a
    steady op looks unsteady (docs/benchmarking.md).
    """
    n, times = (256, 60) if device == "cpu" else (4096, 4)
    a = torch.randn(n, n, device=device, generator=_own_generator(device))
    out = torch.empty_like(a)

    def run() -> dict[str, Any]:
        for _ in range(times):
            torch.mm(a, a, out=out)
        return {}

    return run


def _own_generator(device: str) -> torch.Generator:
    """Measuring the machine takes nothing from the random numbers of what is measured."""
    return torch.Generator(device).manual_seed(0)


def cache_flush(device: str) -> Callable[[], object]:
    """Writes over more memory than caches hold, so that a call finds its inputs where other work left them."""
    scratch = torch.empty((1 << 26) if device == "cpu" else (1 << 28), dtype=torch.uint8, device=device)
    return scratch.zero_


def _median_seconds(run: Callable[[], object], device: str) -> float:
    """Of ten calls, after one that warms up."""
    run()
    return statistics.median(seconds_per_call(run, 1, device)[0] for _ in range(10))


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def machine(device: str, seed: int = 0, commit: str | None = None) -> dict[str, Any]:
    """What the numbers belong to: device, driver, versions, commit, seed, and the rates it was measured to have."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu(),
        "driver": _driver() if device != "cpu" else platform.release(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"fastppo": fastppo.__version__, **versions()},
        "commit": commit or commit_of(),
        "seed": seed,
        **_rates(device),
    }


def _rates(device: str) -> dict[str, Any]:
    """Copy and matmul rates; on a CPU of one thread, of all that torch uses, and of powers of two in between."""
    most = torch.get_num_threads()
    counts = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)}) if device == "cpu" else [most]
    dtypes = (torch.float32, torch.bfloat16)
    rates = {
        count: {
            "copy_gb_per_s": round(copy_rate(device, count) / 1e9, 2),
            **{f"matmul_{_name(t)}_gflop_per_s": round(matmul_rate(device, t, count) / 1e9, 1) for t in dtypes},
        }
        for count in counts
    }
    return {**rates[counts[-1]]} | ({"by_threads": {str(n): r for n, r in rates.items()}} if device == "cpu" else {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Of the packages that decide about speed, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    """NVIDIA's driver and the CUDA or ROCm that torch was built for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    try:
        return f"{subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()}, {runtime}"
    except (OSError, subprocess.CalledProcessError):
        return runtime


def commit_of(root: Path = ROOT) -> str:
    """Of the repository at `root`, this one, with a name for the changes to it; an installed copy has none."""
    if not (root / "pyproject.toml").exists():
        return UNKNOWN
    try:
        commit, changes = (subprocess.run(x, cwd=root, capture_output=True, check=True).stdout for x in (GIT, CHANGES))
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return commit.decode().strip() + (f"-dirty-{hashlib.sha256(changes).hexdigest()[:7]}" if changes else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="ascii") if info.exists() else ""
    return cpu_name(text) or f"{os.cpu_count()} x {platform.processor() or platform.machine()}"


def cpu_name(cpuinfo: str) -> str:
    """Of /proc/cpuinfo; with family and model, as a virtual machine may call two generations by one name."""
    facts = [[part.strip() for part in line.split(":", 1)] for line in cpuinfo.splitlines() if ":" in line]
    names = [fact[1] for fact in facts if fact[0] == "model name"]
    first = {fact[0]: fact[1] for fact in reversed(facts)}
    numbers = [f"{said} {first[key]}" for key, said in (("cpu family", "family"), ("model", "model")) if key in first]
    kind = f" ({', '.join(numbers)})" if numbers else ""
    return f"{len(names)} x {names[0]}{kind}" if names else ""
