"""One token per row; no gradient."""

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.operators.common import side_by_side
from fastppo_kernels.reference import working_dtype


@torch.library.custom_op("fastppo::sample", mutates_args=())
def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, log-probs, log of the kept mass), (R,) each."""
    module = backends.load(backend)
    return module.sample(side_by_side(logits), uniform, temperature=temperature, top_k=top_k, top_p=top_p)


@sample.register_fake
def _(logits, uniform, temperature, top_k, top_p, backend):
    logprobs = torch.empty(logits.shape[0], dtype=working_dtype(logits), device=logits.device)
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device), logprobs, torch.empty_like(logprobs)
