"""A real HTTP endpoint that answers as a test says."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Server:
    """A real endpoint. `replies` are used one after the other, the last one again and again."""

    replies: list[Any]
    url: str = ""
    requests: list[list[dict[str, Any]]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(name="serve")
def serve_fixture() -> Iterator[Callable[..., Server]]:
    running: list[tuple[ThreadingHTTPServer, Server]] = []

    def start(*replies: Any) -> Server:  # status (and where to), bytes, JSON, function of the samples, or what is below
        server = Server(list(replies))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
                server.requests.append(samples)
                reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                reply = reply(samples) if callable(reply) else reply
                if reply == "wait":
                    server.release.wait(30)
                if reply in ("wait", "hang up"):
                    return self.connection.shutdown(socket.SHUT_RDWR)
                status, to = reply if isinstance(reply, tuple) else (reply if isinstance(reply, int) else 200, None)
                self.send_response(status)
                if to is not None:
                    self.send_header("Location", to)
                if reply == "cut short":
                    self.send_header("Content-Length", "100")
                self.end_headers()
                with suppress(OSError):  # who asked may be gone
                    while reply == "drip" and not server.release.wait(0.02):
                        self.wfile.write(b" ")
                    self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

            def log_message(self, format: str, *args: Any) -> None: ...

        listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url = f"http://127.0.0.1:{listener.server_port}/score"
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append((listener, server))
        return server

    yield start
    for listener, server in running:
        server.release.set()
        listener.shutdown()
        listener.server_close()
