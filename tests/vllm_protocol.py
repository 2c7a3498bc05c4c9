"""A server that speaks vLLM's protocol in this process, and can be made to fail in ways that the real one does not on
request. Its weights and log-probs are real: it loads what the engine leaves for it and samples with a copy of its own.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from fastppo import Prompts, Sampling, models
from fastppo.config import ModelConfig
from fastppo.rollout import EmbeddedEngine


@dataclass
class Server:
    """What a test may set and look at; `faults` are taken one per request for a response, then all is well."""

    architecture: str = "qwen2"
    url: str = ""
    version: str = "default"
    faults: list[str] = field(default_factory=list)  # those that `generate` knows, or an HTTP status
    loads: bool = True  # False: an update is acknowledged and nothing changes
    stale_head: bool = False  # a tied head keeps the weights it was built with
    temperature: float | None = None  # samples and reports at this one
    gone: tuple[int, int] = (0, 0)  # an HTTP status, and how many calls a proxy answers with it
    cache_busy: int = 0  # so many resets of the prefix cache do not succeed
    updating: bool = False
    pushes: int = 0
    asleep: bool = False
    calls: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    listener: ThreadingHTTPServer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.policy = self.dummy()
        self.head = models.lm_head(self.policy).weight.detach().clone()

    def dummy(self) -> PreTrainedModel:
        """As --load-format dummy: random weights, not the policy's."""
        return tiny.policy(self.architecture, seed=99)

    def restart(self) -> None:
        """As after a crash: back at the same address, with weights of its own."""
        self.version, self.policy, self.updating, self.asleep = "default", self.dummy(), False, False

    def stop(self) -> None:
        if self.listener is not None:
            self.listener.shutdown()
            self.listener.server_close()
        self.listener = None

    def start(self) -> None:
        port = urlsplit(self.url).port or 0
        self.listener = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self.listener.server_port}"
        threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON; None: hang up."""
        with self.lock:
            self.calls.append(path)
            status, left = self.gone
            if left:
                self.gone = status, left - 1
                return status, {"error": "no server behind this proxy"}
            if path == "/inference/v1/generate":
                return self.generate(body)
            return 200, getattr(self, path.replace("/", "_"))(query, body)

    def _weight_info(self, *_: Any) -> Any:
        return {"weight_version": self.version}

    def _v1_models(self, *_: Any) -> Any:
        return {"data": [{"id": "policy", "max_model_len": 64}]}

    def _pause(self, *_: Any) -> Any:
        return {"status": "paused"}

    _resume = _pause

    def _start_weight_update(self, *_: Any) -> Any:
        if self.updating:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.updating = True

    def _update_weights(self, _: Any, body: dict[str, Any]) -> Any:
        self.pushes += 1
        if not self.loads:
            return
        self.policy = models.load_policy(ModelConfig(path=body["update_info"]["folder"]))
        if self.stale_head:
            with torch.no_grad():
                head: Any = self.policy.get_output_embeddings()
                head.weight = torch.nn.Parameter(self.head.clone())

    def _finish_weight_update(self, _: Any, body: dict[str, Any]) -> Any:
        self.updating = False
        self.version = body.get("weight_version") or self.version

    def _update_weight_version(self, _: Any, body: dict[str, Any]) -> Any:
        self.version = body["new_version"]

    def _reset_prefix_cache(self, *_: Any) -> Any:
        self.cache_busy -= 1
        return {"success": self.cache_busy < 0}

    def _sleep(self, *_: Any) -> Any:
        self.asleep = True

    def _wake_up(self, *_: Any) -> Any:
        self.asleep = False

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert not self.asleep and not self.updating
        self.asked.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "hang up":
            return 0, None
        if fault.isdecimal():
            return int(fault), {"error": "no server behind this proxy"}
        if fault in ("busy", "refuse"):
            return (500 if fault == "busy" else 400), {"error": fault}
        asked = body["sampling_params"]
        sampling = Sampling(
            temperature=self.temperature or asked["temperature"],
            top_k=asked["top_k"],
            top_p=asked["top_p"],
            max_new_tokens=asked["max_tokens"],
            stop_token_ids=tuple(asked["stop_token_ids"]),
            seed=asked["seed"],
        )
        rollout = EmbeddedEngine(self.policy).generate(Prompts(token_ids=(tuple(body["token_ids"]),)), sampling)
        assert rollout.logprobs is not None
        ((prompt, tokens),) = rollout.sequences()
        content = [{"token_id": t, "logprob": x} for t, x in zip(tokens, rollout.logprobs.tolist(), strict=True)]
        if fault == "abort":
            tokens, content = tokens[:1], content[:1]
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": content[:-1] if fault == "short" else content},
            "finish_reason": "abort" if fault == "abort" else rollout.finish_reasons[0],
            "weight_versions": None if fault == "no version" else [{"version": self.version}],
        }
        return 200, {"choices": [choice], "prompt_token_ids": [0] if fault == "other prompt" else prompt}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            where = urlsplit(self.path)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, reply = server.answer(where.path, parse_qs(where.query), json.loads(sent or b"{}"))
            except Exception as error:
                status, reply = 500, {"error": str(error)}
            if status == 0:
                return self.connection.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):  # the client hung up
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler


@pytest.fixture(name="vllm_server")
def vllm_server_fixture() -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(**settings: Any) -> Server:
        running.append(server := Server(**settings))
        server.start()
        return server

    yield start
    for server in running:
        server.stop()
