"""Argument checks shared by the ops: shapes, dtypes and devices only, so they never wait for the device."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(**tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor is float16, bfloat16, float32 or float64."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .float()")


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor lies on the device of the first: kernels follow plain addresses."""
    given = {name: x.device for name, x in tensors.items() if x is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            raise ValueError(
                f"{name} must lie on the device of {first}, {given[first]}, got {device}; "
                f"move it with .to({first}.device)"
            )


def check_gradient_dtype(**tensors: Tensor | None) -> None:
    """Raise ValueError if a gradient of a float16 tensor is wanted, for ops that make it before grad_output is known.

    A row's gradient is about its weight, 1e-5 in a minibatch of 100k tokens, times a probability: what a loss scale is
    to keep from becoming 0 in float16 would be 0 before it is applied.
    """
    for name, x in tensors.items():
        if x is not None and x.dtype == torch.float16 and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the gradient of {name} is made before a loss scale reaches it and would underflow in {x.dtype}; use "
                "bfloat16 or float32, or token_logprobs with ppo_loss, or value_loss: they make it in the backward"
            )


def check_shape(shape: tuple[int, ...], letters: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor has `shape`, which `letters` spells for the message."""
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {letters} = {shape}, got {tuple(x.shape)}")


def check_rows(num_rows: int, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor is a floating-point vector of `num_rows` rows."""
    check_float(**tensors)
    check_shape((num_rows,), "(R,)", **tensors)


def check_targets(targets: Tensor, num_rows: int) -> None:
    """Raise ValueError unless `targets` is (R,) int64."""
    check_shape((num_rows,), "(R,)", targets=targets)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}; convert them with .long()")


def check_logits(logits: Tensor) -> None:
    """Raise ValueError unless `logits` is a floating-point (R, V) matrix with V >= 1."""
    check_float(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (R, V) with V >= 1, got {tuple(logits.shape)}; flatten leading axes first")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int | None) -> None:
    """Raise ValueError unless hidden (R, H), weight (V, H) and bias (V,) fit together."""
    check_float(hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be (R, H) and weight (V, H) with V >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}; flatten hidden with .flatten(0, -2)"
        )
    check_shape((weight.shape[0],), "(V,)", bias=bias)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 row, got {chunk_size}; pass None for the default")


def check_packed(cu_seqlens: Tensor, num_tokens: int, mask: Tensor | None) -> int:
    """Raise ValueError unless cu_seqlens is (B+1,) int32 and mask (N,) bool; returns B."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be (B+1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "it starts at 0 and ends at N"
        )
    check_shape((num_tokens,), "(N,)", mask=mask)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}; write `mask != 0`")
    return cu_seqlens.shape[0] - 1


def in_working_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors without their gradients, in float64 if one of them is, else in float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.detach().to(dtype) for x in tensors]
