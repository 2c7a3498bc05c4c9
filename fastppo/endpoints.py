"""Rewards that are somebody else's code: a Python function, an HTTP endpoint. What fails there is a RewardError."""

import asyncio
import http.client
import importlib
import inspect
import json
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.error import HTTPError

from fastppo.batch import Sample
from fastppo.checks import InputError, require
from fastppo.config_inputs import shown
from fastppo.protocols import SampleScores
from fastppo.secret import filled, redacted, request_parts

T = TypeVar("T")
BUSY = (408, 425, 429)  # HTTP 4xx that may pass
MAX_ANSWER = 1 << 26  # bytes of one answer of an endpoint
REWARD_THREAD = "reward"  # the name of threads that wait for one
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before another try


class RewardError(RuntimeError):
    """A reward failed: it raised, timed out, could not be reached, or returned something that is not scores.

    `divisible`: asked for fewer samples it might have answered.
    """

    def __init__(self, message: str, *, divisible: bool = False) -> None:
        super().__init__(message)
        self.divisible = divisible


class FunctionReward:
    """A Python function `(list[Sample]) -> list[float]`, or a list of per-token lists; plain or async.

    Args:
        function: the callable, or "module:function".
        timeout_s: seconds until a call has failed. A function that ignores it goes on in its thread.
    """

    def __init__(self, function: str | Callable[..., Any], *, name: str = "", timeout_s: float = 60.0) -> None:
        self.function = import_function(function) if isinstance(function, str) else function
        self.name = name or getattr(self.function, "__name__", type(self.function).__name__)
        self.timeout_s = timeout_s

    def __call__(self, samples: Sequence[Sample]) -> SampleScores:
        try:
            return _within(self.timeout_s, lambda: self._call(samples))
        except _TooSlow:
            raise RewardError(f"reward {self.name!r} did not return within timeout_s = {self.timeout_s} s") from None
        except _Raised as raised:
            error = raised.error
            what = f"reward {self.name!r} raised {type(error).__name__}: {error}{_place(error)}"
            raise RewardError(what, divisible=True) from error

    def _call(self, samples: Sequence[Sample]) -> Any:
        result = self.function(list(samples))
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


class HTTPReward:
    """An endpoint: POST {"samples": [...]} answered by {"scores": [...]}, in batches, with retries and back-off."""

    def __init__(
        self, url: str, *, name: str = "http", batch_size: int = 64, timeout_s: float = 60.0, retries: int = 3
    ) -> None:
        legal = url.startswith(("http://", "https://"))
        require(legal, f"a reward URL starts with http:// or https://, got {shown(url)}")
        filled(url)  # a variable that is missing is said now
        self.shown = redacted(url)
        self.url, self.name, self.batch_size, self.timeout_s, self.retries = url, name, batch_size, timeout_s, retries

    def __call__(self, samples: Sequence[Sample]) -> SampleScores:
        scores: list[Any] = []
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            answer = self._post(self._body(batch))
            if len(answer) != len(batch):
                wrong = f"{self.shown} gave {len(answer)} scores for {len(batch)} samples"
                raise RewardError(f"reward {self.name!r}: {wrong}")
            scores += answer
        return scores

    def _body(self, samples: Sequence[Sample]) -> bytes:
        try:
            return json.dumps({"samples": [{**asdict(s), "record": dict(s.record)} for s in samples]}).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}: a record cannot be sent as JSON: {error}") from error

    def _post(self, body: bytes) -> list[Any]:
        for attempt in range(self.retries + 1):
            try:
                return _scores_of(_within(self.timeout_s, lambda: self._answer(body)))
            except (_TooSlow, _Raised, InputError) as failure:  # slow, unreachable, or no scores
                error = failure.error if isinstance(failure, _Raised) else failure
                refused = isinstance(error, HTTPError) and 300 <= error.code < 500 and error.code not in BUSY
                if not isinstance(error, OSError | ValueError | http.client.HTTPException | _TooSlow):
                    raise error from None  # a mistake of ours
                if refused or attempt == self.retries:
                    what = f"{self.shown} failed {attempt + 1} times; the last time: {error}"
                    raise RewardError(f"reward {self.name!r}: {what}") from error
                time.sleep(wait_s(attempt))
        raise AssertionError("unreachable")

    def _answer(self, body: bytes) -> bytes:
        url, who = request_parts(self.url)
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        for name, value in who.items():
            request.add_unredirected_header(name, value)
        until = time.monotonic() + self.timeout_s
        try:
            with _opener().open(request, timeout=self.timeout_s) as response:
                return _body_of(response, until)
        except HTTPError as error:
            error.close()
            if error.code < 400:  # what follows a redirect asks without the samples
                error.msg += f", a redirect to {redacted(error.headers.get('Location', 'nowhere'))}: give that URL"
            raise


def wait_s(tries: int) -> float:
    """Seconds to wait after so many tries and one more: 0.5, 1, 2, ..., 60, 60."""
    return min(FIRST_WAIT * 2 ** min(tries, 30), LONGEST_WAIT)


def _opener() -> urllib.request.OpenerDirector:
    """What `urlopen` uses, but for redirects, FTP, files and data URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in ("ProxyHandler", "UnknownHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler",
                    "HTTPErrorProcessor"):  # fmt: skip
        opener.add_handler(getattr(urllib.request, handler)())
    return opener


def _body_of(response: http.client.HTTPResponse, until: float) -> bytes:
    """All of it; an endless one is given up, and so is one that is still coming at `until` when nobody waits for it any
    more: else a thread and a connection would stay behind for as long as it comes."""
    answer = bytearray()
    while part := response.read1(1 << 16):
        answer += part
        require(len(answer) <= MAX_ANSWER, f"the answer has more than {MAX_ANSWER} bytes")
        if time.monotonic() > until:
            raise _TooSlow
    if response.length:
        raise http.client.IncompleteRead(bytes(answer), response.length)
    return bytes(answer)


class _TooSlow(Exception):
    def __str__(self) -> str:
        return "timed out"


class _Raised(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, from a thread of its own that is left behind after `seconds`: an endpoint that sends a byte
    now and then never meets the time-out of its socket.

    Raises:
        _TooSlow: it did not return in time.
        _Raised: it raised; SystemExit too.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name=REWARD_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise _Raised(outcome["error"])
    if "value" not in outcome:
        raise _TooSlow
    return outcome["value"]


def import_function(spec: str) -> Callable[..., Any]:
    """Import "module:function"."""
    module, _, function = spec.partition(":")
    require(bool(module and function), f"a function is named 'module:function', got {spec!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        not_found = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        hint = "; is its folder on PYTHONPATH?" if not_found else ""
        raise InputError(f"cannot import {spec!r}: {type(error).__name__}: {error}{hint}") from error
    require(callable(found), f"{spec!r} must be a function, got a {type(found).__name__}")
    return found


def _place(error: BaseException) -> str:
    """Where the user's own code raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


async def _awaited(result: Any) -> Any:
    return await result


def _scores_of(answer: bytes) -> list[Any]:
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        scores = None
    if not isinstance(scores, list):
        raise InputError(f'the answer must be {{"scores": [...]}}, got {answer[:100]!r}')
    return scores
