"""The GPUs that kernels are compiled for, and the launches that public functions would make there."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_triton
from triton.runtime.jit import JITFunction

from fastppo_kernels.gpu import launch

TYPES = {
    **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"},
    **{torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"},
}
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}


@dataclass(frozen=True)
class Target:
    """A GPU as the launchers see it."""

    name: str
    gpu: GPUTarget
    shared_memory: int  # bytes that one program may have
    multiprocessor: tuple[int, int, int]  # registers, shared memory bytes and threads of one

    @property
    def is_nvidia(self) -> bool:
        """Whether the result is SASS, and can be read instruction by instruction."""
        return self.gpu.backend == "cuda"


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 166912, (65536, 167936, 2048)),
    Target("sm_86", GPUTarget("cuda", 86, 32), 101376, (65536, 102400, 1536)),
    Target("sm_89", GPUTarget("cuda", 89, 32), 101376, (65536, 102400, 1536)),
    Target("sm_90", GPUTarget("cuda", 90, 32), 232448, (65536, 233472, 2048)),
    Target("sm_100", GPUTarget("cuda", 100, 32), 232448, (65536, 233472, 2048)),
    Target("sm_120", GPUTarget("cuda", 120, 32), 101376, (65536, 102400, 1536)),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 65536, (131072, 65536, 2048)),
)


def programs_per_multiprocessor(target: Target, threads: int, registers: int, shared: int) -> int:
    """How many programs a multiprocessor holds at once."""
    all_registers, all_shared, all_threads = target.multiprocessor
    reserved = 1024 if target.is_nvidia else 1
    by_registers = all_registers // (-(-registers // 8) * 8 * threads)
    return min(by_registers, all_shared // (shared + reserved), all_threads // threads)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and the options of the compiler."""

    kernel: Any  # JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(call: Callable[[], object], target: Target) -> list[Launch]:
    """What `call` launches when its CPU tensors are taken for tensors of `target`; nothing runs."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        arguments = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        bound = inspect.signature(kernel.fn).bind(*args, **arguments)
        bound.apply_defaults()
        found.append(Launch(kernel, dict(bound.arguments), options))

    with _pretending(target), mock.patch.object(JITFunction, "run", record):
        call()
    return found


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    answers = {"shared_memory_bytes": target.shared_memory, "is_amd": not target.is_nvidia}
    with mock.patch.object(launch, "INTERPRETED", True):
        patches = [
            mock.patch.object(module, name, lambda *_, answer=answer: answer)
            for module in _modules_of_the_backend()
            for name, answer in answers.items()
            if hasattr(module, name)
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _modules_of_the_backend() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("fastppo_kernels.gpu")]


def compiled(launch: Launch, target: Target) -> Any:
    """The kernel of a launch compiled for `target`, with the specialisation that Triton would choose at run time."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value, fixed = launch.arguments[parameter.name], parameter.is_constexpr
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if fixed or value is None or (specialised and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = _type(value)
        divisible = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else specialised and value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_triton(source, target=target.gpu, options=launch.options)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
