"""One vLLM server as a run sees it: its HTTP calls, and which weights it samples with.

The calls are those of vLLM 0.32 started with VLLM_SERVER_DEV_MODE=1; `vllm_command.py` has the whole command line.
"""

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastppo.checks import RolloutError

BUSY = (408, 425, 429)  # HTTP 4xx that may pass
GONE = (502, 503, 504)  # a proxy says so of the server behind it, or a server whose engine has died of itself
CONNECT_S = 10.0  # until a server has taken a connection: while one is made, it cannot be hung up
CONTROL_S = 10.0  # of a question that a server answers without work
CACHE_TRIES = 20  # 0.1 s apart: blocks of a request that just ended are let go of within moments


class Unreachable(ConnectionError):
    """The server is gone, or hung up in the middle: it may come back, and then without our weights."""


class Failed(RuntimeError):
    """The server answered that it could not; another try may do."""


class Server:
    """`version` names the weights that it is known to have; None: not known."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.version: str | None = None
        self.down = False
        self._push = threading.Lock()  # of many threads that find it without the weights one brings them
        self.hung_up = False
        self._open: set[http.client.HTTPConnection] = set()

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, method: str = "POST", timeout_s: float | None = None
    ) -> Any:
        """The JSON of one answer. Each call has a connection of its own: an idle one may be closed at any time.

        Raises:
            Unreachable: no answer, only a part of one, or a proxy's that there is no server.
            Failed: any other HTTP 5xx, or 4xx that may pass.
            RolloutError: the server refused the request as it is.
        """
        where = urlsplit(self.url)
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        timeout_s = timeout_s or self.timeout_s
        connection = kind(where.netloc, timeout=min(CONNECT_S, timeout_s))
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            self._open.add(connection)
            if self.hung_up:  # after the line above: either this is seen here, or the connection is seen there
                raise ConnectionAbortedError("sampling was stopped")
            sent = b"" if body is None else json.dumps(body).encode()
            connection.request(method, where.path + path, sent, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url}: {type(error).__name__}: {error}") from error
        finally:
            self._open.discard(connection)
            connection.close()
        said = f"{self.url}{path} answered {status}: {answer[:500].decode(errors='replace')}"
        if status in GONE:
            raise Unreachable(said)
        if status >= 500 or status in BUSY:
            raise Failed(said)
        if status != 200:
            raise RolloutError(f"{said}\n`fastppo doctor` prints how a server for fastppo is started")
        try:
            return json.loads(answer)
        except ValueError as error:
            raise Failed(f"{self.url}{path} did not answer with JSON: {answer[:100]!r}") from error

    def hang_up(self) -> None:
        """End the calls of all threads, and let none begin until `hung_up` is False again."""
        self.hung_up = True
        for connection in list(self._open):
            if (sock := connection.sock) is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def longest(self) -> int:
        """Tokens of prompt and response that it takes."""
        return int(self.call("/v1/models", method="GET", timeout_s=CONTROL_S)["data"][0]["max_model_len"])

    def bring(self, folder: Path, version: str) -> None:
        """Make sure that it samples with the weights in `folder`, which are called `version`."""
        with self._push:
            if self.version == version:
                return
            if self._weights() != version:
                self._update(folder, version)
                if (has := self._weights()) != version:
                    raise Failed(f"{self.url} says it has weights {has!r} after those of {version!r} were loaded")
            self.version = version

    def _weights(self) -> str:
        return self.call("/weight_info", method="GET", timeout_s=CONTROL_S)["weight_version"]

    def _update(self, folder: Path, version: str) -> None:
        self.call("/pause?mode=abort")  # what runs has other weights
        try:
            self.call("/start_weight_update")
        except Failed:  # a trainer that died has left an update open: close it, all of it is loaded anew
            self.call("/finish_weight_update", {})
            self.call("/start_weight_update")
        self.call("/update_weights", {"update_info": {"folder": str(folder)}})
        self.call("/finish_weight_update", {"weight_version": "between two versions"})
        self._forget_keys()
        self.call("/resume")
        self.call("/update_weight_version", {"new_version": version})  # last: it vouches for all of the above

    def _forget_keys(self) -> None:
        """Keys and values of the old weights must not serve the new ones."""
        for _ in range(CACHE_TRIES):
            if self.call("/reset_prefix_cache")["success"] is True:
                return
            time.sleep(0.1)
        raise Failed(f"{self.url} did not reset its prefix cache in {CACHE_TRIES} tries: requests hold it")
