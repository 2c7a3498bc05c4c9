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
from typing import Any
from urllib.error import HTTPError

from fastppo.batch import Sample
from fastppo.checks import InputError, require
from fastppo.protocols import SampleScores

BUSY = (408, 425, 429)  # HTTP 4xx that may pass


class RewardError(RuntimeError):
    """A reward failed: it raised, timed out, could not be reached, or returned something that is not scores."""


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
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                result = self.function(list(samples))
                outcome["value"] = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
            except BaseException as error:  # handed to the caller's thread, which raises it; sys.exit() too
                outcome["error"] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if "error" in outcome:
            error = outcome["error"]
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}{_place(error)}") from error
        if "value" not in outcome:
            raise RewardError(f"reward {self.name!r} did not return within timeout_s = {self.timeout_s} s")
        return outcome["value"]


class HTTPReward:
    """An endpoint: POST {"samples": [...]} answered by {"scores": [...]}, in batches, with retries and back-off."""

    def __init__(
        self, url: str, *, name: str = "http", batch_size: int = 64, timeout_s: float = 60.0, retries: int = 3
    ) -> None:
        require(url.startswith(("http://", "https://")), f"a reward URL starts with http:// or https://, got {url!r}")
        self.url, self.name, self.batch_size, self.timeout_s, self.retries = url, name, batch_size, timeout_s, retries

    def __call__(self, samples: Sequence[Sample]) -> SampleScores:
        scores: list[Any] = []
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            answer = self._post(self._body(batch))
            if len(answer) != len(batch):
                wrong = f"{self.url} gave {len(answer)} scores for {len(batch)} samples"
                raise RewardError(f"reward {self.name!r}: {wrong}")
            scores += answer
        return scores

    def _body(self, samples: Sequence[Sample]) -> bytes:
        try:
            return json.dumps({"samples": [{**asdict(s), "record": dict(s.record)} for s in samples]}).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}: a record cannot be sent as JSON: {error}") from error

    def _post(self, body: bytes) -> list[Any]:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return _scores_of(response.read())
            except (OSError, ValueError, http.client.HTTPException) as error:  # unreachable, slow, or no scores
                refused = isinstance(error, HTTPError) and 400 <= error.code < 500 and error.code not in BUSY
                if refused or attempt == self.retries:
                    raise RewardError(
                        f"reward {self.name!r}: {self.url} failed {attempt + 1} times; the last time: {error}"
                    ) from error
                time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")


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
    except (ValueError, KeyError, TypeError):
        scores = None
    if not isinstance(scores, list):
        raise InputError(f'the answer must be {{"scores": [...]}}, got {answer[:100]!r}')
    return scores
