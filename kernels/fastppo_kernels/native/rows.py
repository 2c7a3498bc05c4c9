"""Row ops in C++: log-probability, entropy, the PPO table and the gradient of the logits. CPU tensors only.

Two sweeps over a row, written once in `csrc/row_kernels.cpp` and compiled for every instruction set (see `isa`). The
numbers of a row depend on that row alone, so neither the number of threads nor the rows beside it change a bit of them.

Letters: R rows, V vocabulary.
"""

import ctypes
import math
from ctypes import byref

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Batch(ctypes.Structure):
    """`Batch` of rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "dlogits", "targets")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab_size", "logits_stride", "dlogits_stride")),
        *((name, ctypes.c_double) for name in ("temperature", "softcap")),
        *((name, ctypes.c_int32) for name in ("logits_dtype", "dlogits_dtype", "entropy", "num_threads", "isa")),
    )


class _PPORows(ctypes.Structure):
    """`PPORows` of rows.h: the fields of `reference.PPORows`, as pointers."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in PPORows._fields)


class _PPOSettings(ctypes.Structure):
    """`PPOSettings` of rows.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("clip_low", "clip_high", "dual_clip")),
        *((name, ctypes.c_double) for name in ("kl_coef", "entropy_coef", "old_kl_coef")),
        *((name, ctypes.c_int32) for name in ("kl_estimator", "straight_through")),
    )


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    rows: PPORows,
    settings: PPOSettings,
    head: HeadSettings,
    *,
    entropy: bool,
    dlogits: Tensor | None,
) -> Tensor:
    """The PPO table of every row and, where `dlogits` is given, the gradient of the summed loss.

    Args:
        logits: (R, V) float32 or bfloat16, before temperature and soft-cap; any row stride.
        targets: (R,) int64 in [0, V); not read where the weight is 0.
        rows: constants of the objective, (R,) each.
        entropy: whether the table's entropy is wanted; must be True if settings.entropy_coef is not 0.
        dlogits: (R, V) float32 or bfloat16 to write to, or None. It may lie over `logits`, row upon row, if its
            elements are no wider: `logits` itself, or bfloat16 at the start of each float32 row.

    Returns:
        (R, 16) float32, columns as in `fastppo_kernels.table`. A row of weight 0 is 0 there and in `dlogits`.

    Raises:
        ValueError: a dtype or a layout is not one of these, a target lies outside [0, V), or entropy_coef is not 0
            without `entropy`; nothing was written.
    """
    if settings.entropy_coef != 0.0 and not entropy:
        raise ValueError(f"entropy_coef = {settings.entropy_coef} needs the entropy of every row; pass entropy=True")
    targets, rows = targets.contiguous(), _float32(rows)
    batch = _batch(logits, targets, head, entropy=entropy, dlogits=dlogits)
    table = torch.empty(logits.shape[0], len(PPO_COLUMNS), dtype=torch.float32)
    given = (byref(batch), byref(_pointers(rows)), byref(_settings(settings)), table.data_ptr())
    _raise_if_bad(load().fastppo_ppo_rows(*given), targets, logits)
    return table


def logprob_rows(logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-probability of the target, entropy or None), (R,) float32 each, in nats; one sweep, no gradient.

    Raises:
        ValueError: as `ppo_rows`.
    """
    targets = targets.contiguous()
    batch = _batch(logits, targets, head, entropy=entropy, dlogits=None)
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32)
    entropies = torch.empty_like(logprobs) if entropy else None
    bad = load().fastppo_logprob_rows(byref(batch), logprobs.data_ptr(), _pointer(entropies))
    _raise_if_bad(bad, targets, logits)
    return logprobs, entropies


def logprob_rows_backward(
    logits: Tensor,
    targets: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    head: HeadSettings,
    *,
    dlogits: Tensor,
) -> None:
    """Writes the gradient of the logits for d log-probability (R,) and d entropy (R,) into `dlogits`, as `ppo_rows`.

    Raises:
        ValueError: as `ppo_rows`.
    """
    targets, given = targets.contiguous(), [_float_row(x) for x in (dlogprobs, dentropy)]
    batch = _batch(logits, targets, head, entropy=dentropy is not None, dlogits=dlogits)
    bad = load().fastppo_logprob_rows_backward(byref(batch), *map(_pointer, given))
    _raise_if_bad(bad, targets, logits)


def ppo_tokens(logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings) -> Tensor:
    """(R, 16) float32: the table of `ppo_rows` from (R,) log-probabilities and entropies."""
    given, rows = [_float_row(x) for x in (logprobs, entropy)], _float32(rows)
    table = torch.empty(logprobs.shape[0], len(PPO_COLUMNS), dtype=torch.float32)
    structs = (byref(_pointers(rows)), byref(_settings(settings)))
    arguments = (logprobs.shape[0], *map(_pointer, given), *structs, torch.get_num_threads(), table.data_ptr())
    load().fastppo_ppo_tokens(*arguments)
    return table


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _float_row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _float32(rows: PPORows) -> PPORows:
    return PPORows(*map(_float_row, rows))


def _pointers(rows: PPORows) -> _PPORows:
    return _PPORows(*map(_pointer, rows))


def _settings(s: PPOSettings) -> _PPOSettings:
    dual_clip = math.inf if s.dual_clip is None else s.dual_clip
    number, plus = int(s.kl_estimator[1]), s.kl_estimator.endswith("+")
    return _PPOSettings(s.clip_low, s.clip_high, dual_clip, s.kl_coef, s.entropy_coef, s.old_kl_coef, number, plus)


def _batch(logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool, dlogits: Tensor | None) -> _Batch:
    """The struct; the caller keeps the tensors alive that it points into."""
    if logits.ndim != 2 or logits.shape[1] == 0 or targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be (R, V) with V >= 1 and targets (R,) int64, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)} {targets.dtype}"
        )
    for name, x in (("logits", logits), ("dlogits", dlogits)):
        if x is not None and (x.dtype not in DTYPES or x.shape != logits.shape or not _is_row_major(x)):
            raise ValueError(
                f"{name} must be (R, V) = {tuple(logits.shape)} float32 or bfloat16 with V contiguous, "
                f"got {tuple(x.shape)} {x.dtype} of strides {x.stride()}; pass {name}.contiguous()"
            )
    gradient = logits if dlogits is None else dlogits
    if dlogits is not None:
        _check_overlap(logits, dlogits)
    return _Batch(
        logits.data_ptr(),
        _pointer(dlogits),
        targets.data_ptr(),
        *logits.shape,
        logits.stride(0),
        gradient.stride(0),
        head.temperature,
        head.softcap or 0.0,
        DTYPES[logits.dtype],
        DTYPES[gradient.dtype],
        entropy,
        torch.get_num_threads(),
        chosen_isa(),
    )


def _is_row_major(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(1) == 1


def _check_overlap(logits: Tensor, dlogits: Tensor) -> None:
    """Raise ValueError if the two share memory other than row upon row, the narrower over the wider."""
    if dlogits.shape[0] > 1 and dlogits.stride(0) < dlogits.shape[1]:
        raise ValueError(f"the rows of dlogits overlap: row stride {dlogits.stride(0)} < V = {dlogits.shape[1]}")
    (first, end), (dfirst, dend) = _span(logits), _span(dlogits)
    if end <= dfirst or dend <= first:
        return
    steps = [x.stride(0) * x.element_size() for x in (logits, dlogits)]
    same_rows = first == dfirst and (logits.shape[0] == 1 or steps[0] == steps[1])
    if not same_rows or dlogits.element_size() > logits.element_size():
        raise ValueError(
            f"dlogits ({dlogits.dtype}, {steps[1]} bytes from row to row) overlaps logits ({logits.dtype}, {steps[0]} "
            "bytes) otherwise than row upon row; pass a buffer of its own, or one whose rows start where those do"
        )


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _raise_if_bad(row: int, targets: Tensor, logits: Tensor) -> None:
    if row >= 0:
        raise ValueError(f"targets[{row}] = {int(targets[row])} must lie in [0, V) = [0, {logits.shape[1]})")
