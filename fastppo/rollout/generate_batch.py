"""Sampling by transformers' continuous batching, for models and GPUs where its paged kernels are the quicker ones.

What it does by itself and must not do here: it leaves the model in eval mode and with another attention, seeds the
global generator, keeps the keys of common prefixes over an update, and returns a failed request as an empty one. Each
call therefore makes a manager of its own, without shared blocks, and puts back what it found. Its thread may end
without a word: whoever waits for a result looks whether it still runs.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fastppo import models
from fastppo.attention import PACKED
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import RolloutError, require
from fastppo.protocols import OnFinish
from fastppo.rollout.kv import kv_budget
from fastppo.rollout.modes import eval_mode

LOG = logging.getLogger("ContinuousBatchingLogger")  # transformers' own
PAGE = 32  # tokens
KNOWN = ContinuousBatchingConfig.__dataclass_fields__  # not the same in transformers 5.17 and 5.23
PAGES = "page_size" if "page_size" in KNOWN else "block_size"
BATCH_TOKENS = 4096  # of one forward; its own default takes 8192 on any machine
POLL_S = 1.0  # between looks at a thread that gives no result
STOP_S = 60.0  # that it has to end its last step in


class GenerateBatchEngine:
    """A `RolloutEngine` on the live policy, through transformers.

    Its log-probs come from paged attention in place of the trainer's own, so they are measured against the trainer's
    and never stand for them.

    Args:
        policy: the module that is trained; modes and attention are left as found, the global generator too.
        eos_token_ids: tokens that end a response, kept as its last token.
        max_rows: sequences decoded at a time.
        kv_bytes: most memory for keys and values, of which it takes what `max_rows` of the longest request need. None:
            on a GPU half of what is free, on a CPU no limit.
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
            RolloutError: transformers failed on a request, or its thread ended; nothing is dropped.
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
        results = []
        with _as_found(self.policy, seed), _running(self.policy, options, self._sizes(requests)) as manager:
            for i, (ids, limit) in enumerate(requests):
                manager.add_request(list(ids), request_id=str(i), max_new_tokens=limit)
            while len(results) < len(requests) and (result := _next_result(manager)) is not None:
                results.append(result)
                if not _is_lost(result):
                    told(result)
            died = manager.background_thread_status.fatal_error
        kept = [result for result in results if not _is_lost(result)]
        if lost := len(requests) - len(kept):
            errors = {str(e) for e in (died, *(r.error for r in results)) if e is not None}
            raise RolloutError(
                f"transformers' generate_batch lost {lost} of {len(requests)} requests: "
                f"{'; '.join(sorted(errors)) or 'no reason given'}; use rollout.engine = 'embedded'"
            )
        return sorted(kept, key=lambda r: int(r.request_id))

    def _sizes(self, requests: Sequence[tuple[Sequence[int], int]]) -> ContinuousBatchingConfig:
        longest = max(-(-(len(ids) + limit) // PAGE) for ids, limit in requests)
        blocks = (min(self.max_rows, len(requests)) + 1) * longest
        budget = kv_budget(self.kv_bytes, self.policy.device)
        if budget is not None:
            blocks = min(blocks, budget // (PAGE * models.kv_bytes_per_token(self.policy)))
        require(
            blocks >= longest,
            f"the keys and values of one sequence take {longest} pages of {PAGE} tokens, more than the {blocks} that "
            "fit: raise rollout.kv_gib, or lower max_new_tokens or the prompts' length",
        )
        named: dict[str, Any] = {PAGES: PAGE}
        if "auto_switch_to_flash" in KNOWN:
            named["auto_switch_to_flash"] = self.policy.dtype.itemsize == 2  # flash-attn knows no float32
        return ContinuousBatchingConfig(
            **named,
            num_blocks=blocks,
            max_batch_tokens=max(BATCH_TOKENS, self.max_rows),
            max_requests_per_batch=self.max_rows,
            allow_block_sharing=False,
            return_logprobs=True,
        )


def _is_lost(result: Any) -> bool:
    return result.error is not None or not result.generated_tokens


def _next_result(manager: Any) -> Any:
    """Of the next request that ended; None: the thread that generates has ended and left no more."""
    while True:
        ends = not manager.is_running()  # looked at first: what it gave before it ended is there afterwards
        result = manager.get_result(timeout=POLL_S)
        if result is not None or ends:
            return result


@contextmanager
def _running(policy: Any, options: GenerationConfig, sizes: ContinuousBatchingConfig) -> Iterator[Any]:
    """A manager whose thread runs; on an error it does not first answer the requests that are left."""
    manager, failed = policy.init_continuous_batching(options, sizes), True
    try:
        _warm_up(manager)
        manager.start()
        yield manager
        failed = False
    finally:
        manager.stop(hard_stop=failed, timeout=STOP_S)
        if manager.is_running():  # `destroy` would wait for it, however long
            raise RolloutError(f"transformers' generate_batch did not stop within {STOP_S:.0f} s")
        manager.destroy()


def _warm_up(manager: Any) -> None:
    """Without what transformers logs in every call where psutil is not installed, of which it asks how much memory
    there is: sizes are given here, so this only matters where it finds that they do not fit."""
    held_back: list[str] = []

    def hold_back(record: logging.LogRecord) -> bool:
        if missing := "psutil" in record.getMessage():
            held_back.append(record.getMessage())
        return not missing

    LOG.addFilter(hold_back)
    try:
        manager.warmup()
    except MemoryError as error:
        hints = "".join(f" ({hint})" for hint in held_back)
        raise RolloutError(
            f"transformers' generate_batch does not start: {error}: lower rollout.max_rows or rollout.kv_gib{hints}"
        ) from error
    finally:
        LOG.removeFilter(hold_back)


@contextmanager
def _as_found(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Within it, transformers' attention and a seeded global generator; afterwards, everything as it was."""
    devices = [model.device] if model.device.type == "cuda" else []
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    with torch.random.fork_rng(devices), eval_mode(model):
        try:
            torch.manual_seed(seed)
            model.set_attn_implementation("sdpa" if model.device.type == "cuda" and not capped else "paged|eager")
            yield
        finally:
            model.set_attn_implementation(PACKED)
