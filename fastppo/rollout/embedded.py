"""Sampling from the trainer's own module: no copy of the weights, nothing cached between updates.

Prompts are read packed, without padding, by the trainer's own attention. Then one forward per token over the rows that
still run: a row that ends gives its place to the last one, and free places to requests that wait.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo import models
from fastppo.attention import plan
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import require
from fastppo.out_of_memory import Portion
from fastppo.rollout.kv import Decode, KVRows, Prefill
from fastppo_kernels import linear, sample

REFILL_AT = 8  # let requests in when 1 place in 8 is free: a prefill of its own for each would cost more
PREFILL_TOKENS = 16384  # of one forward over prompts
SPAN = 32  # positions read are a multiple of it


class EmbeddedEngine:
    """A `RolloutEngine` on the live policy.

    Args:
        policy: the module that is trained; its train/eval mode is left as found.
        eos_token_ids: tokens that end a response, kept as its last token.
        max_rows: sequences decoded at a time; half of that from when memory runs out on, and the call is redone.
        kv_bytes: memory for their keys and values; fewer are decoded at a time where `max_rows` do not fit. None: on a
            GPU half of what is free, on a CPU no limit.
        seed: of the engine's own generator; the global one is not touched.
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
        self.rows, self.kv_bytes = Portion(max_rows, "rows", "rollout.max_rows"), kv_bytes
        self.generator = torch.Generator().manual_seed(seed)
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
        num_positions = -(-longest // SPAN) * SPAN
        n, seed = sampling.samples_per_prompt, sampling.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=self.generator))
        rows = min(self._rows_that_fit(num_positions), len(prompts) * n)

        def attempt(max_rows: int) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
            kv = KVRows(min(rows, max_rows), num_positions)
            job = _Job(self.policy, prompts, sampling, self.eos_token_ids, seed, kv)
            job.run()
            return job.results()

        with _eval_mode(self.policy):
            tokens, logprobs, reasons = self.rows.run("the rollout", attempt, smallest=1, whole=rows)
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

    def _rows_that_fit(self, num_positions: int) -> int:
        budget = self.kv_bytes
        if budget is None and self.policy.device.type == "cuda":
            budget = _free(self.policy.device) // 2
        if budget is None:
            return self.rows.size
        row = num_positions * models.kv_bytes_per_token(self.policy)
        require(
            budget >= row,
            f"the keys and values of one sequence of {num_positions} tokens take {row / 2**30:.3g} GiB, more than the "
            f"{budget / 2**30:.3g} GiB there are: raise rollout.kv_gib, or lower max_new_tokens or the prompts' length",
        )
        return min(self.rows.size, budget // row)


class _Job:
    """One call of `generate`: requests that wait, rows that run, and what was drawn."""

    def __init__(
        self, policy: PreTrainedModel, prompts: Prompts, sampling: Sampling, eos_token_ids: Sequence[int], seed: int,
        kv: KVRows,
    ) -> None:  # fmt: skip
        self.policy, self.prompts, self.sampling, self.kv = policy, prompts, sampling, kv
        device, total = policy.device, len(prompts) * sampling.samples_per_prompt
        limits = prompts.limits or (sampling.max_new_tokens,) * len(prompts)
        # By request:
        self.limits = torch.tensor(limits, device=device).repeat_interleave(sampling.samples_per_prompt)
        self.uniforms = _uniforms(prompts, sampling.samples_per_prompt, max(limits), seed).to(device)
        self.tokens = torch.zeros(total, max(limits), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(total, max(limits), device=device)
        self.lengths = torch.zeros(total, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=device)
        self.stops = torch.tensor([*eos_token_ids, *sampling.stop_token_ids], dtype=torch.int64, device=device)
        # By row, of which the first `live` run; `ends` is how long they are, known without asking the device:
        self.request, self.last, self.position = torch.zeros(3, kv.num_rows, dtype=torch.int64, device=device)
        self.ends: list[int] = []
        self.next = 0

    @property
    def live(self) -> int:
        return len(self.ends)

    def run(self) -> None:
        """Until every request has its response."""
        total, rows = len(self.lengths), self.kv.num_rows
        while self.live or self.next < total:
            if self.next < total and (not self.live or (rows - self.live) * REFILL_AT >= rows):
                self._admit()
            else:
                self._step()

    def results(self) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Tokens, log-probs and finish reasons, by request."""
        sizes = self.lengths.tolist()
        cut = ([row[:n] for row, n in zip(x.tolist(), sizes, strict=True)] for x in (self.tokens, self.logprobs))
        return next(cut), next(cut), ["stop" if s else "length" for s in self.stopped.tolist()]

    def _admit(self) -> None:
        """Read the prompts of waiting requests into free rows; samples of one prompt share its reading."""
        start, n = self.live, self.sampling.samples_per_prompt
        taken: list[int] = []  # requests
        chosen: list[int] = []  # their prompts
        num_tokens = 0
        while self.next < len(self.lengths) and start + len(taken) < self.kv.num_rows:
            i = self.next // n
            if i not in chosen[-1:]:
                num_tokens += len(self.prompts.token_ids[i])
                if taken and num_tokens > PREFILL_TOKENS:
                    break
            taken.append(self.next)
            chosen.append(i)
            self.next += 1
        self.ends += [len(self.prompts.token_ids[i]) for i in chosen]
        rows = slice(start, self.live)
        self.request[rows] = torch.tensor(taken, device=self.request.device)
        self.position[rows] = torch.tensor(self.ends[rows], device=self.request.device)
        self._draw(self._read(chosen, start), rows)

    def _read(self, chosen: list[int], start: int) -> Tensor:
        """Logits (len(chosen), V) after these prompts, whose keys and values go to the rows from `start` on."""
        device = self.request.device
        firsts = [k for k, i in enumerate(chosen) if k == 0 or i != chosen[k - 1]]
        which = [bisect.bisect(firsts, k) - 1 for k in range(len(chosen))]  # the prompt of each row
        prompts = [self.prompts.token_ids[chosen[k]] for k in firsts]
        lengths = [len(p) for p in prompts]
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        rows = (torch.tensor(firsts) + start).repeat_interleave(torch.tensor(lengths)).to(device)
        ids = torch.tensor([token for p in prompts for token in p], device=device)
        packing = plan(lengths, device)
        hidden = self._forward(ids, positions, Prefill(self.kv, rows, positions), packing)
        copies = [(start + firsts[j], start + k) for k, j in enumerate(which) if k != firsts[j]]
        if copies:
            sources, targets = torch.tensor(copies, device=device).unbind(1)
            self.kv.copy(sources, targets, max(lengths))
        logits = self._logits(hidden[packing.cu_seqlens[1:].long() - 1])
        return logits if len(firsts) == len(chosen) else logits[torch.tensor(which, device=device)]

    def _step(self) -> None:
        """One more token for every live row."""
        live = slice(0, self.live)
        span = min(-(-(max(self.ends) + 1) // SPAN) * SPAN, self.kv.num_positions)
        step = Decode(self.kv, self.position[live].clone(), span)
        hidden = self._forward(self.last[live], step.positions, step, None)
        self.position[live] += 1
        self.ends = [end + 1 for end in self.ends]
        self._draw(self._logits(hidden), live)

    def _forward(self, ids: Tensor, positions: Tensor, memory: Any, packing: Any) -> Tensor:
        out = self.policy.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, packing=packing, memory=memory
        )
        return out.last_hidden_state[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = models.lm_head(self.policy)
        logits = linear(hidden, head.weight, head.bias)
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """A token for each of these rows, from its logits; rows that have ended leave."""
        settings, request = self.sampling, self.request[rows]
        count = self.lengths[request]
        token, logprob, *_ = sample(
            logits, self.uniforms[request, count], temperature=settings.temperature, top_k=settings.top_k,
            top_p=settings.top_p,
        )  # fmt: skip
        self.tokens[request, count], self.logprobs[request, count] = token, logprob
        self.lengths[request] = count + 1
        self.last[rows] = token
        self.stopped[request] = stopped = torch.isin(token, self.stops) | self._ends_a_sequence(request, count)
        ended = (stopped | (count + 1 == self.limits[request])).nonzero().squeeze(1)
        self._release([rows.start + i for i in ended.tolist()])

    def _ends_a_sequence(self, request: Tensor, count: Tensor) -> Tensor:
        """Whether the last tokens of a response are one of the stop sequences."""
        found = torch.zeros_like(count, dtype=torch.bool)
        for stop in self.sampling.stop_sequences:
            back = count[:, None] - torch.arange(len(stop) - 1, -1, -1, device=count.device)
            tail = self.tokens[request[:, None], back.clamp(min=0)]
            found |= (back[:, 0] >= 0) & (tail == torch.tensor(stop, device=count.device)).all(1)
        return found

    def _release(self, ended: list[int]) -> None:
        """The last live rows move into the places of those that ended."""
        if not ended:
            return
        live, gone = self.live - len(ended), {*ended}
        holes = [i for i in ended if i < live]
        movers = [i for i in range(live, self.live) if i not in gone]
        if holes:
            sources, targets = (torch.tensor(x, device=self.request.device) for x in (movers, holes))
            self.kv.copy(sources, targets, max(self.ends[i] for i in movers) + 1)
            for state in (self.request, self.last, self.position):
                state[targets] = state[sources]
            for source, target in zip(movers, holes, strict=True):
                self.ends[target] = self.ends[source]
        del self.ends[live:]


def _uniforms(prompts: Prompts, samples_per_prompt: int, count: int, seed: int) -> Tensor:
    """(requests, count) float32 in [0, 1): the numbers of a request follow from the seed, its prompt and its rank
    among the samples of that prompt, also where the prompt occurs twice."""
    generator, seen, rows = torch.Generator(), dict[tuple[int, ...], int](), []
    for ids in prompts.token_ids:
        for _ in range(samples_per_prompt):
            seen[ids] = seen.get(ids, 0) + 1
            digest = hashlib.blake2b(repr((seed, seen[ids], ids)).encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest) >> 1)
            rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def _free(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: what the driver has, and what torch's allocator keeps without using it."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
