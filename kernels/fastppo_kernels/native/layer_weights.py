"""What a decoder layer is given beside its inputs, for `decoder_layer` and for decode steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo_kernels.checks import check_shape


class LayerWeights(NamedTuple):
    """Of a decoder layer, (outputs, inputs): contiguous float32."""

    input_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None  # of a head
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    inner_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


OPTIONAL = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_bias")


class LayerSettings(NamedTuple):
    """Epsilons of the three kinds of norms, and what attention is called with."""

    eps: float
    head_eps: float
    inner_eps: float
    scale: float
    window: int | None = None
    softcap: float | None = None


def check_weights(w: LayerWeights, width: int) -> None:
    """Raise ValueError unless these are there, float32 on the CPU, and of a layer with heads of `width`."""
    for name, x in w._asdict().items():
        if x is None and name not in OPTIONAL:
            raise ValueError(f"{name} must be given: of the weights of a layer {', '.join(OPTIONAL)} may be None")
        if x is not None:
            check_float32(name, x)
    H, wide, narrow, inner = len(w.o), len(w.q), len(w.k), len(w.gate)
    if not width or width % 2 or wide % width or narrow % width or not narrow or wide % narrow:
        raise ValueError(
            f"heads of an even width D in whole groups are needed, got D = {width}, {wide} columns of queries, "
            f"{narrow} of keys"
        )
    check_shape((H,), "(H,)", input_norm=w.input_norm, inner_norm=w.inner_norm)
    check_shape((wide, H), "(heads * D, H)", q=w.q)
    check_shape((narrow, H), "(kv_heads * D, H)", k=w.k, v=w.v)
    check_shape((H, wide), "(H, heads * D)", o=w.o)
    check_shape((inner, H), "(I, H)", gate=w.gate, up=w.up)
    check_shape((H, inner), "(H, I)", down=w.down)
    lengths = {"q_norm": width, "k_norm": width, "q_bias": wide, "k_bias": narrow, "v_bias": narrow, "o_bias": H}
    for name, length in lengths.items():
        check_shape((length,), f"({length},)", **{name: getattr(w, name)})


def check_float32(name: str, x: Tensor) -> None:
    """Raise ValueError unless a kernel can read `x`."""
    if x.dtype != torch.float32 or not x.is_cpu or type(x) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"{name} must be a float32 tensor on the CPU, got a {type(x).__name__} of {x.dtype} on {x.device}"
        )
