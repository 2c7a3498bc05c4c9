"""Sampling by transformers' continuous batching, for models and GPUs where its paged kernels are the quicker ones.

What it does by itself and must not do here: it leaves the model in eval mode and with another attention, seeds the
global generator, keeps the keys of common prefixes over an update, and returns a failed request as an empty one. Each
call therefore makes a manager of its own, without shared blocks, and puts back what it found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fastppo import models
from fastppo.attention import PACKED
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import require
from fastppo.protocols import OnFinish

PAGE = 32  # tokens
BATCH_TOKENS = 4096  # of one forward; its own default takes 8192 on any machine


class GenerateBatchEngine:
    """A `RolloutEngine` on the live policy, through transformers.

    Its log-probs come from paged attention in place of the trainer's own, so they are measured against the trainer's
    and never stand for them.

    Args:
        policy: the module that is trained; mode and attention are left as found, the global generator too.
        eos_token_ids: tokens that end a response, kept as its last token.
        max_rows: sequences decoded at a time.
        kv_bytes: memory for keys and values; None: what `max_rows` of the longest request take.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int] = (),
        max_rows: int = 512,
        kv_bytes: int | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_rows, self.kv_bytes = max_rows, kv_bytes
        self.generator = torch.Generator().manual_seed(seed)
        self.version = 0

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """Only the version: the weights are the policy's own."""
        require(
            policy is self.policy, "this engine samples from the module it was built on; build a new one for another"
        )
        self.version = version

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling, on_finish: OnFinish | None = None) -> Rollout:
        """Draw `samples_per_prompt` responses to each prompt, in order; `on_finish` hears of each as it ends.

        Raises:
            ValueError: a stop sequence, which transformers' continuous batching does not know; or a prompt with its
                response would be longer than the model's context.
            RuntimeError: transformers failed on a request; nothing is dropped.
        """
        require(
            not sampling.stop_sequences,
            "rollout.engine = 'generate_batch' has no stop sequences; use stop_token_ids, or the embedded engine",
        )
        n = sampling.samples_per_prompt
        limits = prompts.limits or (sampling.max_new_tokens,) * len(prompts)
        models.require_context(self.policy, prompts, limits)
        seed = sampling.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=self.generator))
        requests = [(ids, limit) for ids, limit in zip(prompts.token_ids, limits, strict=True) for _ in range(n)]
        stops = {*self.eos_token_ids, *sampling.stop_token_ids}

        def reason(result: Any) -> FinishReason:
            return "stop" if result.generated_tokens[-1] in stops else "length"

        def told(result: Any) -> None:
            if on_finish is not None:
                on_finish(int(result.request_id), result.generated_tokens, reason(result))

        made = self._run(requests, sampling, seed, told)
        return Rollout.pack(
            [ids for ids, _ in requests],
            [r.generated_tokens for r in made],
            finish_reasons=[reason(r) for r in made],
            logprobs=[[min(x, 0.0) for x in r.logprobs] for r in made],  # a log softmax may round to above 0
            group_ids=[i for i in range(len(prompts)) for _ in range(n)],
            records=[r for r in prompts.records for _ in range(n)],
            sampling=sampling,
            policy_version=self.version,
            device=self.policy.device,
        )

    def _run(
        self, requests: Sequence[tuple[Sequence[int], int]], sampling: Sampling, seed: int, told: Callable[[Any], None]
    ) -> list[Any]:
        """The result of every request, in order; `told` of each as it comes."""
        stops = [*self.eos_token_ids, *sampling.stop_token_ids]
        options = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=max(limit for _, limit in requests),
            eos_token_id=stops or -1,
        )
        policy: Any = self.policy
        with (
            _as_found(policy, seed),
            policy.continuous_batching_context_manager(
                generation_config=options, continuous_batching_config=self._sizes(requests)
            ) as manager,
        ):
            for i, (ids, limit) in enumerate(requests):
                manager.add_request(list(ids), request_id=str(i), max_new_tokens=limit)
            results = []
            for _ in requests:
                results.append(result := manager.get_result())
                if not _is_lost(result):
                    told(result)
        lost = sum(_is_lost(r) for r in results)
        if lost:
            errors = sorted({str(r.error) for r in results if r is not None and r.error is not None})
            raise RuntimeError(
                f"transformers' generate_batch lost {lost} of {len(requests)} requests: "
                f"{'; '.join(errors) or 'no reason given'}; use rollout.engine = 'embedded'"
            )
        return sorted((r for r in results if r is not None), key=lambda r: int(r.request_id))

    def _sizes(self, requests: Sequence[tuple[Sequence[int], int]]) -> ContinuousBatchingConfig:
        pages = max(-(-(len(ids) + limit) // PAGE) for ids, limit in requests)
        blocks = (min(self.max_rows, len(requests)) + 1) * pages
        if self.kv_bytes is not None:
            blocks = min(blocks, self.kv_bytes // (PAGE * models.kv_bytes_per_token(self.policy)))
        require(
            blocks >= pages,
            f"the keys and values of one sequence take {pages} pages of {PAGE} tokens, more than the {blocks} that "
            "fit: raise rollout.kv_gib, or lower max_new_tokens or the prompts' length",
        )
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=blocks,
            max_batch_tokens=max(BATCH_TOKENS, self.max_rows),
            max_requests_per_batch=self.max_rows,
            allow_block_sharing=False,
            return_logprobs=True,
        )


def _is_lost(result: Any) -> bool:
    return result is None or result.error is not None or not result.generated_tokens


@contextmanager
def _as_found(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Within it, transformers' attention and a seeded global generator; afterwards, everything as it was."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        model.set_attn_implementation("paged|sdpa" if model.device.type == "cuda" and not capped else "paged|eager")
        try:
            yield
        finally:
            model.set_attn_implementation(PACKED)
            model.train(training)
