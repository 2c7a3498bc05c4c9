"""A name that cannot be had is refused at once, for the reason it cannot: no such model, no access, no network."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from fastppo import ModelConfig, models
from fastppo.hub import require_there

PATH = "/{repo_id}/resolve/{revision}/{filename}"
ANSWERS = {  # what the hub says of a model, by its name
    "here": (200, ""),
    "without-config": (404, "EntryNotFound"),
    "nowhere": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "broken": (503, ""),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, code = ANSWERS[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not told to stay offline, nothing in the cache, and nobody answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + PATH)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + PATH)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("role", ["tokenizer", "policy", "reward model", "critic"])
def test_without_a_network_every_role_fails_at_once_and_says_so(role: str, online: None) -> None:
    """transformers tries for 25 seconds per file, and then misses a tokenizer."""
    load = {
        "tokenizer": models.load_tokenizer,
        "policy": lambda path: models.load_policy(ModelConfig(path=path)),
        "reward model": models.load_reward_model,
        "critic": models.load_critic,
    }[role]
    start = time.monotonic()
    reason = r"127.0.0.1:9 cannot be reached \(.*refused\): give a local folder, or a hub name that is in the cache"
    with pytest.raises(ValueError, match=f"cannot load 'some/model': it is not a local folder, and .*{reason}"):
        load("some/model")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("some/nowhere", "the Hugging Face hub has no model of that name, or keeps it private"),
        ("some/gated", "ask on its page, `hf auth login`"),
        ("some/broken", r"answers with an error \(.*503.*\): give a local folder"),
        ("a name", "the Hugging Face hub has no such names"),
    ],
)
def test_what_the_hub_answers_is_the_reason(name: str, reason: str, hub: None) -> None:
    with pytest.raises(ValueError, match=f"cannot load {name!r}: it is not a local folder, and .*{reason}") as error:
        require_there(name)
    assert "\n" not in str(error.value)


def test_what_can_be_had_passes(hub: None, tmp_path: Path) -> None:
    """Also a repository that lacks a file: what needs the file says so."""
    for name in ("some/here", "some/without-config", str(tmp_path)):
        require_there(name)


def test_what_is_cached_needs_no_network(online: None, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    require_there("some/model")
