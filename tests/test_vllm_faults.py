"""Servers that are not there, and places where weights cannot be left; tests/test_vllm.py has what goes well."""

import errno
import gc
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batches import prompts
from fastppo.checks import RolloutError
from fastppo.rollout import rarely, weights
from fastppo.rollout import vllm_server as vllm_server_module
from test_vllm import DRAWN, Serve, gap, quick, responses, sampler  # noqa: F401
from vllm_protocol import vllm_server_fixture  # noqa: F401


def test_a_dead_server_is_waited_for(vllm_server: Serve, tmp_path: Path, capsys: Any) -> None:
    server = vllm_server()
    made = sampler(tmp_path, server)
    expected = responses(made.generate(prompts(6), DRAWN))
    server.stop()
    server.restart()
    threading.Timer(0.3, server.start).start()
    assert responses(made.generate(prompts(6), DRAWN)) == expected
    out = capsys.readouterr().out
    assert (
        out.count("waiting 20 s for one of rollout.vllm.servers to start or to come back") == 1
        and "is back, it gets the weights again" in out
    )


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_its_server_is_waited_for(status: int, vllm_server: Serve, tmp_path: Path, capsys: Any) -> None:
    """Longer than a server may fail a request, and the weights are brought again."""
    server = vllm_server()
    made = sampler(tmp_path, server, retries=1)
    expected = responses(made.generate(prompts(6), DRAWN))
    server.faults, pushes = [str(status)] * 9, server.pushes
    assert responses(made.generate(prompts(6), DRAWN)) == expected and server.pushes == pushes
    server.restart()
    server.gone = (status, 5)
    assert responses(made.generate(prompts(6), DRAWN)) == expected and server.pushes == pushes + 1
    assert "is back, it gets the weights again" in capsys.readouterr().out


def test_a_proxy_that_stays_without_its_server_ends_the_run_in_time(vllm_server: Serve, tmp_path: Path) -> None:
    """Also where everything but the request itself is answered."""
    server = vllm_server(faults=["503"] * 10**4)
    with pytest.raises(RolloutError, match=r"a request failed \d+ times; the last time: .* answered 503"):
        sampler(tmp_path, server, retries=1, wait_s=0.2).generate(prompts(2), DRAWN)
    server.gone = (503, 10**6)
    with pytest.raises(RolloutError, match=r"no vLLM server answered for rollout.vllm.wait_s = 0 s \(.*503"):
        sampler(tmp_path, server, wait_s=0.1).generate(prompts(2), DRAWN)


def test_a_fault_that_lasts_is_said_at_doubling_intervals(
    vllm_server: Serve, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request finds a server that says it is there and then answers as if it were not."""
    server = vllm_server(faults=["503"] * 40)
    made = sampler(tmp_path, server, retries=100)
    assert len(made.generate(prompts(6), DRAWN)) == 6 and not server.faults
    out = capsys.readouterr().out
    assert out.count("waiting") == 1 and out.count("is back") == 1
    clock = iter(range(1000))
    monkeypatch.setattr(rarely, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    say = rarely.Rarely()
    for i in range(100):
        say("gone", f"gone {i}")
    say.anew("gone")
    say("gone", "gone again")
    said = [(i, f" (and {n} times since this was last said)") for i, n in ((10, 9), (30, 19), (70, 39))]
    expected = ["gone 0", *(f"gone {i}{held}" for i, held in said), "gone again"]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_connection_that_nobody_takes_is_given_up_before_the_request_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_server_module, "CONNECT_S", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # more than the queue of those that wait to be taken
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with pytest.raises(vllm_server_module.Unreachable, match="timed out"):
            vllm_server_module.Server(f"http://127.0.0.1:{address[1]}", 600.0).call("/weight_info", method="GET")
        for one in waiting:
            one.close()


def test_a_file_system_without_locks_is_named(
    vllm_server: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(weights.fcntl, "flock", refuses)
    with pytest.raises(ValueError, match=r"cannot lock .*folder = '.*' \(No locks available\): give one on a file"):
        sampler(tmp_path, vllm_server())
    gc.collect()
    assert not list(tmp_path.glob(f"{weights.PREFIX}*"))


def test_of_two_servers_the_other_goes_on(vllm_server: Serve, tmp_path: Path) -> None:
    one, other = vllm_server(), vllm_server()
    made = sampler(tmp_path, one, other)
    expected = responses(made.generate(prompts(6), DRAWN))
    other.stop()
    asked = len(one.asked)
    assert responses(made.generate(prompts(6), DRAWN)) == expected and len(one.asked) == asked + 6
    other.restart()
    other.start()
    assert responses(made.generate(prompts(6), DRAWN)) == expected and other.pushes == 2


def test_a_server_that_stays_away_ends_the_run_in_time(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    made = sampler(tmp_path, server, wait_s=0.1)
    server.stop()
    with pytest.raises(RolloutError, match=r"no vLLM server answered for rollout.vllm.wait_s = 0 s \(http.*refused\)"):
        made.generate(prompts(6), DRAWN)


def test_an_update_that_a_dead_trainer_left_open_is_closed(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server(updating=True)
    made = sampler(tmp_path, server)
    assert gap(made, made.generate(prompts(6), DRAWN)) <= 1e-5
