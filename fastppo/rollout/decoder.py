"""How the embedded engine samples: requests that wait, rows that run, and what was drawn."""

import bisect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import models
from fastppo.attention import padded, plan
from fastppo.batch import FinishReason, Prompts, Sampling
from fastppo.protocols import OnFinish
from fastppo.rollout.graphs import Steps, bucket
from fastppo.rollout.kv import Decode, KVRows, Prefill
from fastppo.rollout.layer_steps import LayerSteps, agree, layer_steps
from fastppo.rollout.seeds import request_seeds
from fastppo_kernels import linear, sample

REFILL_AT = 8  # let requests in when 1 place in 8 is free: a prefill of its own for each would cost more
PREFILL_TOKENS = 16384  # of one forward over prompts
SPAN = 32  # positions read are a multiple of it


@dataclass(frozen=True)
class Capacity:
    """What a `Decoder` has memory for."""

    rows: int  # sequences that run at a time
    positions: int  # tokens of one, prompt and response
    requests: int
    tokens: int  # new ones of a request

    def holds(self, other: "Capacity") -> bool:
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))


class Decoder:
    """Memory for sequences and what is drawn, and the steps that fill it; a call of `run` leaves nothing to the next.

    Behind the last request there is a spare one, whose limit is 0: rows that do not run hold it and stand still, so a
    step may run more rows than there are.
    """

    def __init__(
        self, policy: PreTrainedModel, capacity: Capacity, *, eos_token_ids: Sequence[int], cuda_graphs: bool
    ) -> None:
        self.policy, self.capacity, self.eos_token_ids = policy, capacity, tuple(eos_token_ids)
        self.kv, self.spare = KVRows(capacity.rows, capacity.positions), capacity.requests
        self.fixed_shapes = cuda_graphs and policy.device.type == "cuda"
        advance = weakref.WeakMethod(self._advance)  # no cycle: keys and values go with their last user
        self.steps = Steps(lambda *args: _called(advance, *args), policy.device, record=self.fixed_shapes)
        self.places = _places(policy)
        self.stops: dict[Sampling, tuple[Tensor, ...]] = {}
        integers: dict[str, Any] = {"dtype": torch.int64, "device": policy.device}
        # By request:
        shape = (capacity.requests + 1, capacity.tokens)
        self.limits, self.lengths = torch.zeros(2, shape[0], **integers)
        self.stopped = torch.zeros(shape[0], dtype=torch.bool, device=policy.device)
        self.uniforms, self.logprobs = torch.zeros(2, *shape, device=policy.device)
        self.tokens = torch.zeros(shape, **integers)
        # By row, of which the first `live` run; `ends` is how long they are, known without asking the device:
        self.request, self.last, self.position = torch.zeros(3, capacity.rows, **integers)
        self.ends: list[int] = []
        self.on_finish: OnFinish | None = None
        self.layer_steps: LayerSteps | None = None
        self.first_step = True

    @property
    def fits(self) -> bool:
        """Whether recorded steps read the policy where it is: offloading or loading may have moved it."""
        return self.places == _places(self.policy)

    @property
    def live(self) -> int:
        return len(self.ends)

    def run(
        self, prompts: Prompts, sampling: Sampling, seed: int, on_finish: OnFinish | None = None
    ) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Tokens, log-probs and finish reasons of the response to every request, in order."""
        self._begin(prompts, sampling, seed)
        self.on_finish = on_finish
        total, places = len(prompts) * sampling.samples_per_prompt, self.capacity.rows
        while self.live or self.next < total:
            if self.next < total and (not self.live or (places - self.live) * REFILL_AT >= places):
                self._admit(total)
            else:
                self._step()
        sizes = self.lengths[:total].tolist()
        used = (x[:total, : max(sizes)].tolist() for x in (self.tokens, self.logprobs))
        cut = ([row[:n] for row, n in zip(rows, sizes, strict=True)] for rows in used)
        self.on_finish = self.layer_steps = None
        return next(cut), next(cut), ["stop" if s else "length" for s in self.stopped[:total].tolist()]

    def _begin(self, prompts: Prompts, sampling: Sampling, seed: int) -> None:
        """Every row stands still, every request waits."""
        n, device = sampling.samples_per_prompt, self.policy.device
        self.samples_per_prompt = n
        self.layer_steps, self.first_step = None, True
        self.prompts, self.sampling, self.next, self.ends = prompts, _of_steps(sampling), 0, []
        limits = torch.tensor(prompts.limits or (sampling.max_new_tokens,) * len(prompts)).repeat_interleave(n)
        for state in (self.limits, self.lengths, self.stopped, self.last, self.position):
            state.zero_()
        self.request.fill_(self.spare)
        self.limits[: len(limits)] = limits.to(device)
        self.uniforms[: len(limits), : limits.max()] = uniforms(prompts, n, int(limits.max()), seed).to(device)
        if self.sampling not in self.stops:  # kept: a recorded step reads them where they are
            singles = [*self.eos_token_ids, *sampling.stop_token_ids]
            made = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (singles, *sampling.stop_sequences))
            self.stops[self.sampling] = tuple(made)

    def _admit(self, total: int) -> None:
        """Read the prompts of waiting requests into free rows; samples of one prompt share its reading."""
        start, n = self.live, self.samples_per_prompt
        taken: list[int] = []  # requests
        chosen: list[int] = []  # their prompts
        num_tokens = 0
        while self.next < total and start + len(taken) < self.kv.num_rows:
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
        self._release(self._draw(self._read(chosen, start), rows, self.sampling), start)

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
        packing = plan(lengths, device, recurring=True)
        memory = Prefill(self.kv, rows, positions)
        hidden = self._forward(padded(ids, packing), padded(positions, packing), memory, packing)
        copies = [(start + firsts[j], start + k) for k, j in enumerate(which) if k != firsts[j]]
        if copies:
            sources, targets = torch.tensor(copies, device=device).unbind(1)
            self.kv.copy(sources, targets, max(lengths))
        logits = self._logits(hidden[packing.cu_seqlens[1:].long() - 1])
        return logits if len(firsts) == len(chosen) else logits[torch.tensor(which, device=device)]

    def _step(self) -> None:
        """One more token for every live row."""
        if self.fixed_shapes:
            rows, span = bucket(self.live, self.capacity.rows), self.capacity.positions
        else:
            rows, span = self.live, min(-(-(max(self.ends) + 1) // SPAN) * SPAN, self.capacity.positions)
        ended = self.steps(rows, span, self.sampling)
        self.ends = [end + 1 for end in self.ends]
        self._release(ended[: self.live], 0)

    def _advance(self, count: int, span: int, sampling: Sampling) -> Tensor:
        """A token for each of the first `count` rows; which of them ended, (count,) bool."""
        rows = slice(0, count)
        step = Decode(self.kv, self.position[rows].clone(), span)
        hidden = self._hidden(self.last[rows], step)
        self.position[rows] += self.request[rows] != self.spare
        return self._draw(self._logits(hidden), rows, sampling)

    def _hidden(self, ids: Tensor, step: Decode) -> Tensor:
        """Of the tokens. The modules make the first step of a call too, and last: theirs are its keys and values."""
        if self.layer_steps is not None:
            return self.layer_steps(ids, step)
        tried, self.first_step = layer_steps(self.policy, step) if self.first_step else None, False
        found = None if tried is None else tried(ids, step)
        hidden = self._forward(ids, step.positions, step, None)
        if found is not None and agree(found, hidden):
            self.layer_steps = tried
        return hidden

    def _forward(self, ids: Tensor, positions: Tensor, memory: Any, packing: Any) -> Tensor:
        out = self.policy.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, packing=packing, memory=memory
        )
        return out.last_hidden_state[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = models.lm_head(self.policy)
        logits = linear(hidden, head.weight, head.bias)
        return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)

    def _draw(self, logits: Tensor, rows: slice, sampling: Sampling) -> Tensor:
        """A token for each of these rows, from its logits; which of them ended."""
        request = self.request[rows]
        count = self.lengths[request]
        token, logprob, *_ = sample(
            logits, self.uniforms[request, count], temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p,
        )  # fmt: skip
        self.tokens[request, count], self.logprobs[request, count] = token, logprob
        self.lengths[request] = count + (request != self.spare)
        self.last[rows] = token
        singles, *sequences = self.stops[sampling]
        stopped = (token[:, None] == singles).any(1)  # torch.isin sorts, and waits, where there are many
        for sequence in sequences:
            stopped |= self._ends_with(sequence, request, count)
        self.stopped[request] = stopped
        return stopped | (count + 1 >= self.limits[request])

    def _ends_with(self, sequence: Tensor, request: Tensor, count: Tensor) -> Tensor:
        """Whether the tokens up to number `count` of a response are `sequence` at their end."""
        back = count[:, None] - torch.arange(len(sequence) - 1, -1, -1, device=count.device)
        tail = self.tokens[request[:, None], back.clamp(min=0)]
        return (back[:, 0] >= 0) & (tail == sequence).all(1)

    def _announce(self, rows: list[int]) -> None:
        if self.on_finish is None:
            return
        request = self.request[torch.tensor(rows, device=self.request.device)]
        state = (request, self.lengths[request], self.stopped[request], self.tokens[request])
        for place, length, stopped, tokens in zip(*(x.tolist() for x in state), strict=True):
            self.on_finish(place, tokens[:length], "stop" if stopped else "length")

    def _release(self, ended: Tensor, start: int) -> None:
        """The last live rows move into the places of those from `start` on that ended."""
        places = [start + i for i, over in enumerate(ended.tolist()) if over]
        if not places:
            return
        self._announce(places)
        before, live, gone = self.live, self.live - len(places), {*places}
        holes = [i for i in places if i < live]
        movers = [i for i in range(live, before) if i not in gone]
        if holes:
            sources, targets = (torch.tensor(x, device=self.request.device) for x in (movers, holes))
            self.kv.copy(sources, targets, max(self.ends[i] for i in movers) + 1)
            for state in (self.request, self.last, self.position):
                state[targets] = state[sources]
            for source, target in zip(movers, holes, strict=True):
                self.ends[target] = self.ends[source]
        self.request[live:before] = self.spare
        self.position[live:before] = 0
        del self.ends[live:]


def uniforms(prompts: Prompts, samples_per_prompt: int, count: int, seed: int) -> Tensor:
    """(requests, count) float32 in [0, 1)."""
    generator, rows = torch.Generator(), []
    for number in request_seeds(prompts, samples_per_prompt, seed):
        generator.manual_seed(number)
        rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def _places(policy: PreTrainedModel) -> list[int]:
    return [x.data_ptr() for x in (*policy.parameters(), *policy.buffers())]


def _of_steps(sampling: Sampling) -> Sampling:
    """What a step depends on: one recording serves training and evaluation where they differ in the rest."""
    return replace(sampling, seed=None, max_new_tokens=1, samples_per_prompt=1)


def _called(method: weakref.WeakMethod[Callable[..., Any]], *args: Any) -> Any:
    bound = method()
    assert bound is not None, "steps do not outlive their decoder"
    return bound(*args)
