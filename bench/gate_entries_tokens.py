"""What the cross-compile gate compiles of the kernels of values, sequences and sampling.

Each entry: the kernel ("module:function"), its runtime arguments (type; None for an argument left out), constants, the
integers that are multiples of 16 at run time (pointers always are), num_warps, and the least number of 16-byte loads.
"""

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
WHOLE = {"top_k": None, "top_p": None}  # nothing is cut
LLAMA = {"NUM_BLOCKS": 16, "BLOCK": 8192}  # V = 128256, and up to 131072


def entry(
    name: str,
    kernel: str,
    signature: dict[str, str | None],
    constants: dict[str, Any],
    num_warps: int = 4,
    multiples: tuple[str, ...] = (),
    wide_loads: int = 0,
) -> dict[str, Any]:
    """One line of ENTRIES; `multiples` names the integer arguments that are multiples of 16."""
    return {
        **{"name": name, "kernel": kernel, "signature": signature, "constexprs": constants},
        **{"num_warps": num_warps, "div16": multiples, "min_vec128": wide_loads},
    }


def linear(name: str, tile: int, block: int, num_warps: int, wide_loads: int, **change: str | None) -> dict[str, Any]:
    """A shape of the value head; ROWS, TILE, BLOCK_H and num_warps are those of `values.linear_tile`."""
    constants = {"ROWS": 32, "TILE": tile, "BLOCK_H": block}
    multiples = ("H", "hidden_stride", "dhidden_stride")
    kernel = f"{VALUES}:_linear_value_kernel"
    return entry(f"linear_value {name}", kernel, LINEAR | change, constants, num_warps, multiples, wide_loads)


def sampling(name: str, wide_loads: int, multiples: tuple[str, ...] = (), **change: str | None) -> dict[str, Any]:
    kernel = f"{SAMPLING}:_sample_kernel"
    return entry(f"sample {name}", kernel, SAMPLE | change, LLAMA, 16, ("row_stride", *multiples), wide_loads)


NO_GRADIENT = {"dhidden_ptr": None, "partial_ptr": None}
TOKENS = {"BLOCK": 1024}
ENTRIES = [
    entry("value", f"{VALUES}:_value_kernel", VALUE, {"BLOCK": 256}),
    linear("H=896", 8, 1024, 4, 1),
    linear("H=4096", 4, 4096, 8, 1),
    linear("H=8192", 4, 8192, 16, 1),
    linear("H=16384", 2, 16384, 16, 1),
    linear("H=4096 fp32", 4, 4096, 8, 1, hidden_ptr="*fp32", weight_ptr="*fp32", bias_ptr="*fp32", dhidden_ptr="*fp32"),
    linear("H=4096 forward", 4, 4096, 8, 1, **NO_GRADIENT),
    entry("sum_lines", f"{VALUES}:_sum_lines_kernel", LINES, {"BLOCK_P": 32, "BLOCK_H": 32}, multiples=("H",)),
    entry("gae", f"{SEQUENCES}:_gae_kernel", GAE | {"mask_ptr": None, "bootstrap_ptr": None}, TOKENS),
    entry("gae mask", f"{SEQUENCES}:_gae_kernel", GAE, TOKENS),
    entry(
        "token_rewards", f"{SEQUENCES}:_token_rewards_kernel", REWARDS, TOKENS | {"ESTIMATOR": 3, "PER_TOKEN": False}
    ),
    entry("moments", f"{SEQUENCES}:_partial_moments_kernel", MOMENTS, {"BLOCK": 4096}),
    entry("merge_moments", f"{SEQUENCES}:_merge_moments_kernel", MERGE, {"BLOCK": 256}),
    sampling("bf16", 2, ("V",), **WHOLE),
    sampling("fp32", 4, ("V",), logits_ptr="*fp32", **WHOLE),
    sampling("bf16, ragged V", 2, **WHOLE),
    sampling("top_k top_p bf16", 8, ("V",)),
    sampling("top_k top_p fp32", 16, ("V",), logits_ptr="*fp32"),
    sampling("top_p bf16", 6, ("V",), top_k=None),
]
