"""Sampling by vLLM servers, over HTTP; vLLM itself is never imported.

The weights of each version are left in a folder (`weights.py`), and a server that does not have them gets them before
it is asked: after an update, at the first call, and after a restart are one case. Every answer says which weights drew
it, so that one from a server that came back with others is not taken.
"""

import itertools
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastppo import distributed, models
from fastppo.batch import FinishReason, Prompts, Rollout, Sampling
from fastppo.checks import RolloutError, require
from fastppo.config import VLLMConfig
from fastppo.protocols import OnFinish
from fastppo.rollout.rarely import Rarely
from fastppo.rollout.seeds import request_seeds
from fastppo.rollout.vllm_server import CONTROL_S, Failed, Server, Unreachable
from fastppo.rollout.weights import PublishedWeights

POLL_S = 1.0  # between looks for a server that is to come back
BACKOFF_S = 0.5  # after the first failure of a request, doubled after each up to 32 times


@dataclass(frozen=True)
class Request:
    """One response that is wanted."""

    prompt: tuple[int, ...]
    limit: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """What was drawn for it."""

    tokens: list[int]
    logprobs: list[float]
    reason: FinishReason


class VLLMEngine:
    """A `RolloutEngine` on servers that hold a copy of the policy.

    Args:
        policy: the module that is trained; the servers run the same architecture.
        eos_token_ids: tokens that end a response, kept as its last token.
        config: where the servers are and how long to wait for them.
        max_rows: requests in flight at a time, over all servers.
        seed: of the engine's own generator.

    Raises:
        ValueError: there are fewer servers than ranks, or the folder for weights cannot be written.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int] = (),
        config: VLLMConfig | None = None,
        max_rows: int = 512,
        seed: int = 0,
    ) -> None:
        self.policy, self.eos_token_ids, self.max_rows = policy, tuple(eos_token_ids), max_rows
        self.config = config or VLLMConfig()
        mine = self.config.servers[distributed.rank() :: distributed.world_size()]
        require(
            len(mine) > 0,
            f"rollout.vllm.servers has {len(self.config.servers)} servers for {distributed.world_size()} ranks: each "
            "rank needs one of its own",
        )
        self.servers = [Server(url, self.config.timeout_s) for url in mine]
        self.weights = PublishedWeights(self.config.folder)
        self.generator = torch.Generator().manual_seed(seed)
        self.version = 0
        self._one_at_a_time = threading.Lock()  # a rollout that runs ahead, an evaluation, and new weights
        self._waiting, self._say = threading.Lock(), Rarely()
        self._closed, self._stopped = False, threading.Event()

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """Leave these weights for the servers, which get them at the next `generate`; waits for one that runs."""
        with self._one_at_a_time:
            self.weights.publish(policy, version)
            self.version = version

    def generate(self, prompts: Prompts, sampling: Sampling, on_finish: OnFinish | None = None) -> Rollout:
        """Draw `samples_per_prompt` responses to each prompt, in order; `on_finish` hears of each as it ends.

        Each request has a seed of its own, from the sampling seed, its prompt and its rank. Rounding in the server's
        batches may still change a token now and then.

        Raises:
            ValueError: a prompt with its response is longer than the model's or a server's context.
            RolloutError: no server answered for `wait_s`, or one refused or kept failing a request; nothing is dropped.
        """
        n, seed = sampling.samples_per_prompt, sampling.seed
        limits = prompts.limits or (sampling.max_new_tokens,) * len(prompts)
        longest = models.require_context(self.policy, prompts, limits)
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=self.generator))
        pairs = [pair for pair in zip(prompts.token_ids, limits, strict=True) for _ in range(n)]
        seeds = request_seeds(prompts, n, seed)
        requests = [Request(ids, limit, number) for (ids, limit), number in zip(pairs, seeds, strict=True)]
        with self._one_at_a_time:
            if self.weights.current is None:
                self.weights.publish(self.policy, self.version)
            version = self.version
            self._pick_up()
            self._wake(longest)
            answers = self._collect(requests, sampling, on_finish)
            self._sleep()
        return Rollout.pack(
            [request.prompt for request in requests],
            [answer.tokens for answer in answers],
            finish_reasons=[answer.reason for answer in answers],
            logprobs=[answer.logprobs for answer in answers],
            group_ids=[i for i in range(len(prompts)) for _ in range(n)],
            records=[r for r in prompts.records for _ in range(n)],
            sampling=sampling,
            policy_version=version,
            device=self.policy.device,
        )

    def stop(self) -> None:
        """End a `generate` that runs in another thread, and every later one: they raise."""
        self._closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        self._stopped.set()
        for server in self.servers:
            server.hang_up()

    def _pick_up(self) -> None:
        self._stopped.clear()
        for server in self.servers:
            server.hung_up = False
        if self._closed:  # looked at last: `stop` may come at any time
            self._hang_up()
            raise RolloutError("sampling was stopped")

    def _collect(self, requests: list[Request], sampling: Sampling, on_finish: OnFinish | None) -> list[Answer]:
        """The answer to every request, in order. What ends it ends every call that is under way."""
        with ThreadPoolExecutor(min(self.max_rows, len(requests)), thread_name_prefix="vllm") as pool:
            places: dict[Future[Answer], int] = {
                pool.submit(self._answer, i, request, sampling): i for i, request in enumerate(requests)
            }
            try:
                for future in as_completed(places):
                    answer = future.result()
                    if on_finish is not None:
                        on_finish(places[future], answer.tokens, answer.reason)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()
                raise
        return [future.result() for future in places]

    def _answer(self, place: int, request: Request, sampling: Sampling) -> Answer:
        """Ask until a server answers with the current weights: `retries` more times where one says that it failed, and
        at least for `wait_s` where none can be reached."""
        body, failures, since = self._body(request, sampling), {Failed: 0, Unreachable: 0}, math.inf
        for attempt in itertools.count():
            server = self._next(place + attempt)
            try:
                self._bring(server)
                return self._read(server, server.call("/inference/v1/generate", body), request, sampling)
            except (Unreachable, Failed) as error:
                server.version = None  # whoever answers next is asked what it has
                server.down |= (gone := isinstance(error, Unreachable))
                failures[type(error)] += 1
                since = min(since, time.monotonic())
                waited = not gone or time.monotonic() > since + self.config.wait_s
                if self._stopped.is_set() or (waited and failures[type(error)] > self.config.retries):
                    raise RolloutError(f"a request failed {attempt + 1} times; the last time: {error}") from error
                self._stopped.wait(BACKOFF_S * 2 ** min(attempt, 5))
        raise AssertionError("unreachable")

    def _bring(self, server: Server) -> None:
        assert self.weights.current is not None
        server.bring(self.weights.current, self.weights.version)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {
            "token_ids": list(request.prompt),
            "return_token_ids": True,
            "cache_salt": self.weights.version,  # keys of other weights are never found, whatever the cache holds
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "max_tokens": request.limit,
                "seed": request.seed,
                "stop_token_ids": [*self.eos_token_ids, *sampling.stop_token_ids],
                "ignore_eos": True,  # the server's own idea of them
                "logprobs": 0,
                "detokenize": False,
            },
        }

    def _read(self, server: Server, answer: Any, request: Request, sampling: Sampling) -> Answer:
        """Check an answer: all of it, for this prompt, from these weights. Tokens after a stop sequence go."""
        try:
            (choice,) = answer["choices"]
            tokens, content = choice["token_ids"], choice["logprobs"]["content"]
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            logprobs = [min(float(entry["logprob"]), 0.0) for entry in content]  # a log softmax may round to above 0
            same = [entry["token_id"] for entry in content] == tokens and answer["prompt_token_ids"] == [
                *request.prompt
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Failed(f"{server.url}: not an answer of vLLM >= 0.32: {type(error).__name__}: {error}") from error
        if versions != {self.weights.version}:
            raise Failed(f"{server.url} answered with weights {sorted(versions)}, not {self.weights.version!r}")
        stopped = bool(tokens) and tokens[-1] in (*self.eos_token_ids, *sampling.stop_token_ids)
        if not same or not (stopped or len(tokens) == request.limit):
            raise Failed(f"{server.url} gave {len(tokens)} of {request.limit} tokens, then {choice['finish_reason']!r}")
        end = _end_of_sequence(tokens, sampling.stop_sequences)
        reason: FinishReason = "stop" if stopped or end is not None else "length"
        return Answer(tokens[:end], logprobs[:end], reason)

    def _next(self, turn: int) -> Server:
        """Servers take turns; when none is left, wait for the first that comes back."""
        up = [server for server in self.servers if not server.down]
        if up:
            return up[turn % len(up)]
        with self._waiting:
            up = [server for server in self.servers if not server.down]
            return up[turn % len(up)] if up else self._wait_for_one()

    def _wait_for_one(self) -> Server:
        end, reason = time.monotonic() + self.config.wait_s, ""
        waits = (
            f"rollout: no vLLM server answers, waiting {self.config.wait_s:.0f} s for one of rollout.vllm.servers to "
            "start or to come back (docs/rollout.md says how to start one)"
        )
        while time.monotonic() < end and not self._stopped.is_set():
            self._say("gone", waits)
            for server in self.servers:
                try:
                    server.call("/weight_info", method="GET", timeout_s=CONTROL_S)
                    self._awaken(server)
                except (Unreachable, Failed) as error:
                    reason = str(error)
                    continue
                server.version, server.down = None, False
                self._say(f"{server.url} back", f"rollout: {server.url} is back, it gets the weights again")
                return server
            self._stopped.wait(POLL_S)
        raise RolloutError(
            f"no vLLM server answered for rollout.vllm.wait_s = {self.config.wait_s:.0f} s ({reason}): start one, as "
            "`fastppo doctor` prints it, and go on with --resume"
        )

    def _wake(self, longest: int) -> None:
        """Look after every server; one that is gone is left out while others are there."""
        for server in self.servers:
            server.version, server.down = None, False
            try:
                context = server.longest()
                self._awaken(server)
                self._bring(server)
            except (Unreachable, Failed) as error:
                server.down = self.config.sleep or isinstance(error, Unreachable)
                self._say(server.url, f"rollout: {error}")
                continue
            self._say.anew(server.url, "gone", f"{server.url} back")
            require(
                longest <= context,
                f"a prompt and its response make {longest} tokens, more than the --max-model-len {context} of "
                f"{server.url}: start it with at least that",
            )

    def _awaken(self, server: Server) -> None:
        """On one card it needs what the trainer's allocator keeps without using it."""
        if self.config.sleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            server.call("/wake_up")

    def _sleep(self) -> None:
        for server in self.servers if self.config.sleep else ():
            try:
                server.call("/sleep?level=1&mode=wait")
            except (Unreachable, Failed) as error:
                self._say(f"{server.url} to sleep", f"rollout: {error}")


def _end_of_sequence(tokens: list[int], stops: Sequence[Sequence[int]]) -> int | None:
    """Where the first stop sequence in `tokens` ends; None without one."""
    ends = (n for n in range(1, len(tokens) + 1) if any(tokens[max(n - len(x), 0) : n] == [*x] for x in stops))
    return next(ends, None)
