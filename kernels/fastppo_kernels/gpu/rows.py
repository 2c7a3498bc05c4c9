"""Launchers of the row kernel: PPO from logits, log-probabilities, and their gradient.

Letters: R rows, V vocabulary. Logits and their gradient are bfloat16, float16 or float32, last stride 1, any row
stride; loads and stores are 16 bytes wide when rows start at multiples of 16 bytes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels.gpu.launch import (
    NO_DUAL_CLIP,
    ROW_DTYPES,
    check_device,
    num_processors,
    on_device,
    options,
    shared_memory_bytes,
    vector,
)
from fastppo_kernels.gpu.maths import ESTIMATOR_CODES
from fastppo_kernels.gpu.row_kernels import rows_kernel
from fastppo_kernels.gpu.shapes import LaunchShape, launch_shape, splits_rows
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    rows: PPORows,
    settings: PPOSettings,
    head: HeadSettings,
    *,
    entropy: bool,
    dlogits: Tensor | None,
    split: bool | None = None,
    shape: LaunchShape | None = None,
) -> Tensor:
    """(R, 16) float32 table of the PPO objective, and its gradient with respect to the logits.

    Args:
        logits: (R, V), before soft-cap and temperature.
        targets: (R,) int64 in [0, V); anything where the weight is 0. Elsewhere a target outside, which the host does
            not look for, makes the row's loss, log-prob and gradient NaN.
        rows: (R,) each. A row of weight 0 gives zeros, whatever stands in it.
        settings, head: of the objective and of the logits.
        entropy: fill the column `entropy`; needed if entropy_coef != 0.
        dlogits: (R, V) for the gradient of the sum of column `loss`, or None. May be the logits, or a 2-byte tensor
            whose rows start where those of the float32 logits start.
        split: whether several programs share a row; None lets `splits_rows` decide. The numbers are the same.
        shape: of the launch, to try others than `launch_shape`: the order of summation follows it.

    Raises:
        ValueError: CPU tensors without the interpreter, an unknown dtype, rows of dlogits that overlap each other, or
            dlogits overlapping the logits otherwise.
    """
    table = torch.empty(logits.shape[0], len(PPO_COLUMNS), dtype=torch.float32, device=logits.device)
    names = ("old", "advantages", "weights", "ref", "is", "sampler")
    vectors = {f"{name}_ptr": vector(x) for name, x in zip(names, rows, strict=True)}
    _launch(logits, targets, head, dlogits, split, entropy, {"table_ptr": table, **vectors}, settings, shape)
    return table


def logprob_rows(
    logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool, split: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of the target, entropy or None), (R,) float32 each, in one sweep; arguments as in `ppo_rows`."""
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(logprobs) if entropy else None
    _launch(logits, targets, head, None, split, entropy, {"logprobs_ptr": logprobs, "entropy_ptr": entropies})
    return logprobs, entropies


def logprob_rows_backward(
    logits: Tensor,
    targets: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    head: HeadSettings,
    *,
    dlogits: Tensor,
    split: bool | None = None,
) -> None:
    """Writes the gradient with respect to the logits of dlogprobs . logprobs + dentropy . entropy, (R,) each.

    A row whose given slopes are all 0 gets zeros and is not read. Other arguments as in `ppo_rows`.
    """
    slopes = {"dlogprobs_ptr": vector(dlogprobs), "dentropy_ptr": vector(dentropy)}
    _launch(logits, targets, head, dlogits, split, dentropy is not None, slopes)


def _launch(
    logits: Tensor,
    targets: Tensor,
    head: HeadSettings,
    dlogits: Tensor | None,
    split: bool | None,
    entropy: bool,
    pointers: dict[str, Tensor | None],
    settings: PPOSettings | None = None,
    shape: LaunchShape | None = None,
) -> None:
    check_device(logits)
    _check_matrices(logits, dlogits)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    shape = shape or launch_shape(vocab_size, logits.element_size(), shared_memory_bytes(logits))
    overlap = dlogits is not None and _overlaps(logits, dlogits)
    if split is None:
        split = splits_rows(num_rows, num_processors(logits))
    arguments = _arguments(logits, targets, head, dlogits, entropy, pointers, settings or PPOSettings(), shape)
    arguments["OVERLAP"] = overlap
    whole = options(shape.threads, max_registers=shape.max_registers)
    with on_device(logits):
        # A 2-byte gradient over 4-byte logits lies under the logits of other slices, so one program keeps the row.
        if not split or shape.slices == 1 or overlap:
            rows_kernel[(num_rows,)](**arguments, PART="whole", partials_ptr=None, **whole)
            return
        arguments["partials_ptr"] = logits.new_empty(num_rows, shape.slices, 4, dtype=torch.float32)
        slices = options(shape.threads // shape.slices)
        rows_kernel[(num_rows * shape.slices,)](**arguments, PART="statistics", **slices)
        if dlogits is None:
            rows_kernel[(num_rows,)](**arguments, PART="result", **whole)
        else:
            rows_kernel[(num_rows * shape.slices,)](**arguments, PART="gradient", **slices)


def _arguments(
    logits: Tensor,
    targets: Tensor,
    head: HeadSettings,
    dlogits: Tensor | None,
    entropy: bool,
    pointers: dict[str, Tensor | None],
    settings: PPOSettings,
    shape: LaunchShape,
) -> dict[str, Any]:
    """Everything the kernel takes but PART and partials_ptr."""
    names = ("table", "weights", "advantages", "old", "ref", "is", "sampler", "logprobs", "entropy")
    absent = {f"{name}_ptr": None for name in (*names, "dlogprobs", "dentropy")}
    x_units, x_unit = _row_units(logits)
    dx_units, dx_unit = (0, 1) if dlogits is None else _row_units(dlogits)
    per_nat = 1.0 / (math.log(2.0) * head.temperature)
    return absent | {
        **pointers,
        **{"x_ptr": logits.detach(), "dx_ptr": dlogits, "targets_ptr": targets.contiguous()},
        **{"x_units": x_units, "dx_units": dx_units, "n_cols": logits.shape[1]},
        "scale": per_nat if head.softcap is None else per_nat * head.softcap,
        "softcap_rate": 0.0 if head.softcap is None else -2.0 / (math.log(2.0) * head.softcap),
        "inv_temperature": 1.0 / head.temperature,
        **{"clip_low": float(settings.clip_low), "clip_high": float(settings.clip_high)},
        "dual_clip": NO_DUAL_CLIP if settings.dual_clip is None else float(settings.dual_clip),
        **{"kl_coef": float(settings.kl_coef), "old_kl_coef": float(settings.old_kl_coef)},
        **{"entropy_coef": float(settings.entropy_coef), "ESTIMATOR": ESTIMATOR_CODES[settings.kl_estimator]},
        **{"ENTROPY": entropy, "SOFTCAP": head.softcap is not None, "X_UNIT": x_unit, "DX_UNIT": dx_unit},
        **{"LANE": shape.lane, "REPS": shape.reps, "ROW": shape.row, "SLICES": shape.slices, "STAGES": shape.stages},
    }


def _row_units(x: Tensor) -> tuple[int, int]:
    """(row stride in units, unit in elements): 16-byte units if rows start at multiples of them, else elements."""
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % unit == 0
    return (x.stride(0) // unit, unit) if aligned else (x.stride(0), 1)


def _check_matrices(logits: Tensor, dlogits: Tensor | None) -> None:
    for name, x in (("logits", logits), ("dlogits", dlogits)):
        if x is None:
            continue
        if x.dtype not in ROW_DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16 or float32 for the Triton kernels, got {x.dtype}")
        if x.ndim != 2 or x.shape != logits.shape or (x.stride(1) != 1 and x.shape[1] != 1):
            raise ValueError(
                f"{name} must be (R, V) = {tuple(logits.shape)} with last stride 1, "
                f"got {tuple(x.shape)} with strides {x.stride()}; call .contiguous() on it"
            )
    if dlogits is not None and dlogits.shape[0] > 1 and dlogits.stride(0) < dlogits.shape[1]:
        raise ValueError(
            f"the rows of dlogits overlap: a row stride of {dlogits.stride(0)} < V = {dlogits.shape[1]}; a tensor made "
            "by .expand() needs a .contiguous() before its gradient can be written over it"
        )


def _overlaps(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether a narrower dlogits lies over the logits, row on row; equal types in place are no overlap here."""
    (start, end), (dstart, dend) = _extent(logits), _extent(dlogits)
    if dend <= start or end <= dstart:
        return False
    same_rows = logits.shape[0] == 1 or _row_bytes(logits) == _row_bytes(dlogits)
    if start != dstart or not same_rows or dlogits.element_size() > logits.element_size():
        raise ValueError(
            "dlogits overlap the logits, so their rows must start at the same addresses and be no wider; "
            f"got row strides of {_row_bytes(logits)} and {_row_bytes(dlogits)} bytes, {dstart - start} bytes apart"
        )
    return dlogits.element_size() != logits.element_size()


def _row_bytes(x: Tensor) -> int:
    return x.stride(0) * x.element_size()


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of `x` and the one after its last."""
    start = x.data_ptr()
    return start, start + (x.shape[0] - 1) * _row_bytes(x) + x.shape[1] * x.element_size() if x.numel() else start
