"""Sampling from the trainer's own module: no copy of the weights, nothing cached between updates.

Prompts are read packed, none padded to another's length, by the trainer's own attention. Then one forward per token
over the rows that still run: a row that ends gives its place to the last one, and free places to requests that wait.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from fastppo import models
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import require
from fastppo.out_of_memory import Portion
from fastppo.protocols import OnFinish
from fastppo.rollout.decoder import SPAN, Capacity, Decoder
from fastppo.rollout.kv import kv_budget
from fastppo.rollout.modes import eval_mode


class EmbeddedEngine:
    """A `RolloutEngine` on the live policy.

    Args:
        policy: the module that is trained; the train/eval mode of each of its modules is left as found.
        eos_token_ids: tokens that end a response, kept as its last token.
        max_rows: sequences decoded at a time; half of that from when memory runs out on, and the call is redone.
        kv_bytes: memory for their keys and values; fewer are decoded at a time where `max_rows` do not fit. None: on a
            GPU half of what is free, on a CPU no limit.
        cuda_graphs: on a GPU, replay decode steps as CUDA graphs.
        keep_memory: keep the memory of keys and values and the graphs from call to call.
        seed: of the engine's own generator; the global one is not touched.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int] = (),
        max_rows: int = 512,
        kv_bytes: int | None = None,
        cuda_graphs: bool = True,
        keep_memory: bool = False,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.eos_token_ids = tuple(eos_token_ids)
        self.rows, self.kv_bytes = Portion(max_rows, "rows", "rollout.max_rows"), kv_bytes
        self.cuda_graphs, self.keep_memory = cuda_graphs, keep_memory
        self._kept: Decoder | None = None
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

        What a request draws follows from the seed, its prompt and which of its samples it is: the number of rows and
        the order of the prompts change nothing but rounding.

        Returns:
            A rollout whose log-probs are those of the distribution each token was drawn from.

        Raises:
            ValueError: a prompt with its response would be longer than the model's context, or not one row fits
                `kv_bytes`.
        """
        limits = prompts.limits or (sampling.max_new_tokens,) * len(prompts)
        longest = models.require_context(self.policy, prompts, limits)
        n, seed = sampling.samples_per_prompt, sampling.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=self.generator))
        wanted = Capacity(self.rows.size, -(-longest // SPAN) * SPAN, len(prompts) * n, max(limits))
        decoder: list[Decoder] = [self._decoder(wanted)]

        def attempt(max_rows: int) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
            made = decoder.pop() if decoder else self._decoder(replace(wanted, rows=max_rows))
            drawn = made.run(prompts, sampling, seed, on_finish)
            self._kept = made if self.keep_memory else None
            return drawn

        with eval_mode(self.policy):
            tokens, logprobs, reasons = self.rows.run(
                "the rollout", attempt, smallest=1, whole=decoder[0].capacity.rows
            )
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

    def _decoder(self, wanted: Capacity) -> Decoder:
        """The one that was kept, if it is large enough, else a new one, of as many rows as fit."""
        kept, self._kept = self._kept, None
        if kept is not None:
            had = kept.capacity
            wasteful = had.positions > 2 * wanted.positions  # few rows of far longer sequences
            rows = min(wanted.rows, wanted.requests) if wasteful else 1
            if kept.fits and had.holds(replace(wanted, rows=rows)):
                return kept
            requests, tokens = max(wanted.requests, had.requests), max(wanted.tokens, had.tokens)
            positions = wanted.positions if wasteful else max(wanted.positions, had.positions)
            wanted = Capacity(wanted.rows, positions, requests, tokens)
            del kept  # its memory counts as free
        rows = min(self._rows_that_fit(wanted.positions), wanted.rows, wanted.requests)
        capacity = replace(wanted, rows=rows)
        return Decoder(self.policy, capacity, eos_token_ids=self.eos_token_ids, cuda_graphs=self.cuda_graphs)

    def _rows_that_fit(self, num_positions: int) -> int:
        budget = kv_budget(self.kv_bytes, self.policy.device)
        if budget is None:
            return self.rows.size
        row = num_positions * models.kv_bytes_per_token(self.policy)
        require(
            budget >= row,
            f"the keys and values of one sequence of {num_positions} tokens take {row / 2**30:.3g} GiB, more than the "
            f"{budget / 2**30:.3g} GiB there are: raise rollout.kv_gib, or lower max_new_tokens or the prompts' length",
        )
        return min(self.rows.size, budget // row)
