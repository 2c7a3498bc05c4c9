"""One module per op: the cases of `fastppo bench kernels`. Each has `parser()` and `cases(options)`."""

from types import ModuleType

from fastppo.bench.ops import (
    decode_attention,
    gae,
    linear_ppo_loss,
    logits_ppo_loss,
    packed_attention,
    ppo_loss,
    sample,
    token_logprobs,
    value,
)

OPS: dict[str, ModuleType] = {
    "logits_ppo_loss": logits_ppo_loss,
    "linear_ppo_loss": linear_ppo_loss,
    "token_logprobs": token_logprobs,
    "ppo_loss": ppo_loss,
    "value": value,
    "gae": gae,
    "sample": sample,
    "decode_attention": decode_attention,
    "packed_attention": packed_attention,
}
