"""Sampling from the trainer's own module: no copy of the weights, nothing cached between updates.

Left-padded prompts, transformers' KV cache, one forward per token over the rows that still run; rows that have ended
are dropped from the cache. Samples of one prompt share its prefill.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fastppo import models
from fastppo.attention import dense_attention
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import require
from fastppo_kernels import sample

COMPACT_AT = 8  # drop ended rows when they are 1 in 8: the cache is copied to do so


class EmbeddedEngine:
    """A `RolloutEngine` on the live policy.

    Args:
        policy: the module that is trained; its train/eval mode is left as found.
        eos_token_ids: tokens that end a response, kept as its last token.
        max_rows: sequences decoded at a time.
        seed: of the engine's own generator; the global one is not touched.
    """

    def __init__(
        self, policy: PreTrainedModel, *, eos_token_ids: Sequence[int] = (), max_rows: int = 512, seed: int = 0
    ) -> None:
        self.policy = policy
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_rows = max_rows
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.version = 0

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """Only the version: the weights are the policy's own."""
        require(
            policy is self.policy, "this engine samples from the module it was built on; build a new one for another"
        )
        self.version = version

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Draw `samples_per_prompt` responses to each prompt, in order.

        Returns:
            A rollout whose log-probs are those of the distribution each token was drawn from.

        Raises:
            ValueError: a prompt with its response would be longer than the model's context.
        """
        self._check_context(prompts, sampling)
        n = sampling.samples_per_prompt
        generator = self.generator
        if sampling.seed is not None:
            generator = torch.Generator(self.policy.device).manual_seed(sampling.seed)
        size = max(1, self.max_rows // n)
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        with dense_attention(self.policy), _eval_mode(self.policy):
            for start in range(0, len(prompts), size):
                chunk = self._decode(prompts.token_ids[start : start + size], sampling, generator)
                tokens += chunk[0]
                logprobs += chunk[1]
        stops = {*self.eos_token_ids, *sampling.stop_token_ids}
        reasons: list[FinishReason] = ["stop" if t[-1] in stops else "length" for t in tokens]
        return Rollout.pack(
            [p for p in prompts.token_ids for _ in range(n)],
            tokens,
            finish_reasons=reasons,
            logprobs=logprobs,
            group_ids=[i for i in range(len(prompts)) for _ in range(n)],
            records=[r for r in prompts.records for _ in range(n)],
            sampling=sampling,
            exact=self.policy.dtype == torch.float32,
            policy_version=self.version,
            device=self.policy.device,
        )

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[list[int]], list[list[float]]]:
        device, n = self.policy.device, sampling.samples_per_prompt
        stops = torch.tensor([*self.eos_token_ids, *sampling.stop_token_ids], dtype=torch.int64, device=device)
        ids, mask = _left_pad(prompts, device)
        cache = DynamicCache(config=self.policy.config)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if n > 1:
            cache.batch_repeat_interleave(n)
            logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        rows = len(prompts) * n
        tokens = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(rows, sampling.max_new_tokens, device=device)
        lengths = torch.full((rows,), sampling.max_new_tokens, device=device)
        live, ended = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
        for t in range(sampling.max_new_tokens):
            token, logprob = _draw(logits, sampling, generator)
            tokens[live, t], logprobs[live, t] = token, logprob
            stopped = torch.isin(token, stops) & ~ended
            lengths[live[stopped]] = t + 1
            ended |= stopped
            num_ended = int(ended.sum())
            if num_ended == len(live) or t + 1 == sampling.max_new_tokens:
                break
            if num_ended * COMPACT_AT >= len(live):
                keep = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                live, mask, token, ended = live[keep], mask[keep], token[keep], ended[keep]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        sizes = lengths.tolist()
        return (
            [row[:k] for row, k in zip(tokens.tolist(), sizes, strict=True)],
            [row[:k] for row, k in zip(logprobs.tolist(), sizes, strict=True)],
        )

    def _forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        out = self.policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _check_context(self, prompts: Prompts, sampling: Sampling) -> None:
        context = models.context_length(self.policy)
        longest = max(len(p) for p in prompts.token_ids)
        require(
            longest + sampling.max_new_tokens <= context,
            f"a prompt of {longest} tokens plus max_new_tokens = {sampling.max_new_tokens} exceeds the model's "
            f"context of {context}: shorten the prompts or lower max_new_tokens",
        )


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(logits.shape[0], device=logits.device, generator=generator)
    return sample(logits, uniform, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(b, T) ids and 0/1 mask; the mask comes from lengths, so any id may be the padding."""
    T = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()  # in train mode gradient checkpointing would switch the cache off
    try:
        yield
    finally:
        model.train(training)
