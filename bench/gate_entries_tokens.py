"""What the cross-compile gate compiles of the kernels of values, sequences and sampling.

Each entry: the kernel ("module:function"), its runtime arguments (type; None for an argument left out), constants, the
integers that are multiples of 16 at run time (pointers always are), num_warps, the least number of 16-byte loads
(cp.async among them) and the most of 2-byte ones (one is the weight of a row, or the drawn logit).
"""

from collections.abc import Mapping
from typing import Any

VALUES, SEQUENCES, SAMPLING = (f"fastppo_kernels.gpu.{name}" for name in ("values", "sequences", "sampling"))

VALUE = {
    **{f"{name}_ptr": "*fp32" for name in ("values", "old_values", "returns", "weights", "table")},
    **{"R": "i32", "clip": "fp32"},
}
LINEAR = {
    **{"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16"},
    **{f"{name}_ptr": "*fp32" for name in ("old_values", "returns", "weights", "table")},
    **{"dhidden_ptr": "*bf16", "partial_ptr": "*fp32", "R": "i32", "H": "i32"},
    **{"hidden_stride": "i32", "dhidden_stride": "i32", "clip": "fp32"},
}
LINES = {"partial_ptr": "*fp32", "dweight_ptr": "*fp32", "P": "i32", "H": "i32"}
GAE = {
    **{"rewards_ptr": "*fp32", "values_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "mask_ptr": "*u8"},
    **{"bootstrap_ptr": "*fp32", "advantages_ptr": "*fp32", "returns_ptr": "*fp32"},
    **{"B": "i32", "N": "i32", "gamma": "fp32", "decay": "fp32"},
}
REWARDS = {
    **{"scores_ptr": "*fp32", "logprobs_ptr": "*fp32", "ref_logprobs_ptr": "*fp32", "cu_seqlens_ptr": "*i32"},
    **{"mask_ptr": "*u8", "rewards_ptr": "*fp32", "B": "i32", "N": "i32", "kl_coef": "fp32"},
}
MOMENTS = {"values_ptr": "*fp32", "mask_ptr": "*u8", "partial_ptr": "*fp64", "N": "i32"}
MERGE = {"partial_ptr": "*fp64", "out_ptr": "*fp64", "P": "i32"}
SAMPLE = {
    **{"logits_ptr": "*bf16", "uniform_ptr": "*fp32", "tokens_ptr": "*i64", "logprobs_ptr": "*fp32"},
    **{"log_mass_ptr": "*fp32", "V": "i32", "row_stride": "i32", "scale": "fp32", "inverse_temperature": "fp32"},
    **{"top_k": "fp32", "top_p": "fp32"},
}
WHOLE: dict[str, Any] = {"top_k": None, "top_p": None}  # nothing is cut
LLAMA = {"NUM_BLOCKS": 16, "BLOCK": 8192}  # V = 128256, and up to 131072


def entry(
    name: str,
    kernel: str,
    signature: Mapping[str, str | None],
    constants: dict[str, Any],
    num_warps: int = 4,
    multiples: tuple[str, ...] = (),
    wide_loads: int = 0,
    narrow_loads: int = 1,
) -> dict[str, Any]:
    """One line of ENTRIES; `multiples` names the integer arguments that are multiples of 16."""
    return {
        **{"name": name, "kernel": kernel, "signature": signature, "constexprs": constants},
        **{"num_warps": num_warps, "div16": multiples, "min_vec128": wide_loads, "max_scalar16": narrow_loads},
    }


def linear(name: str, tile: int, block: int, num_warps: int, wide_loads: int, **change: str | None) -> dict[str, Any]:
    """A shape of the value head; ROWS, TILE, BLOCK_H and num_warps are those of `values.linear_tile`."""
    constants = {"ROWS": 32, "TILE": tile, "BLOCK_H": block}
    multiples = ("H", "hidden_stride", "dhidden_stride")
    kernel = f"{VALUES}:_linear_value_kernel"
    return entry(f"linear_value {name}", kernel, LINEAR | change, constants, num_warps, multiples, wide_loads)


def sampling(name: str, wide_loads: int, narrow_loads: int = 1, **change: str | None) -> dict[str, Any]:
    """A way to sample; with narrow_loads > 1 V is no multiple of 16, and the last block is read with a mask."""
    multiples = ("row_stride", "V") if narrow_loads == 1 else ("row_stride",)
    constants = LLAMA | {"VIEW": 0 if change.keys() >= WHOLE.keys() else 1}
    kernel = f"{SAMPLING}:_sample_kernel"
    return entry(f"sample {name}", kernel, SAMPLE | change, constants, 16, multiples, wide_loads, narrow_loads)


NO_GRADIENT: dict[str, Any] = {"dhidden_ptr": None, "partial_ptr": None}
TOKENS = {"BLOCK": 1024}
ENTRIES = [
    entry("value", f"{VALUES}:_value_kernel", VALUE, {"BLOCK": 256}),
    linear("H=896", 4, 1024, 4, 1),
    linear("H=4096", 2, 4096, 8, 1),
    linear("H=8192", 2, 8192, 16, 1),
    linear("H=16384", 1, 16384, 16, 1),
    linear("H=4096 fp32", 2, 4096, 8, 1, hidden_ptr="*fp32", weight_ptr="*fp32", bias_ptr="*fp32", dhidden_ptr="*fp32"),
    linear("H=4096 forward", 2, 4096, 8, 1, **NO_GRADIENT),
    entry("sum_lines", f"{VALUES}:_sum_lines_kernel", LINES, {"BLOCK_P": 32, "BLOCK_H": 32}, multiples=("H",)),
    entry("gae", f"{SEQUENCES}:_gae_kernel", GAE | {"mask_ptr": None, "bootstrap_ptr": None}, TOKENS),
    entry("gae mask", f"{SEQUENCES}:_gae_kernel", GAE, TOKENS),
    entry(
        "token_rewards", f"{SEQUENCES}:_token_rewards_kernel", REWARDS, TOKENS | {"ESTIMATOR": 3, "PER_TOKEN": False}
    ),
    entry("moments", f"{SEQUENCES}:_partial_moments_kernel", MOMENTS, {"BLOCK": 4096}),
    entry("merge_moments", f"{SEQUENCES}:_merge_moments_kernel", MERGE, {"BLOCK": 256}),
    sampling("bf16", 8, **WHOLE),
    sampling("fp32", 16, logits_ptr="*fp32", **WHOLE),
    sampling("bf16, ragged V", 4, 33, **WHOLE),
    sampling("top_k top_p bf16", 32),
    sampling("top_k top_p fp32", 64, logits_ptr="*fp32"),
    sampling("top_p bf16", 24, top_k=None),
]
