"""The vLLM engine against a server in this process: nothing is dropped, nothing comes from other weights, nothing waits
for ever. tests/test_vllm_server.py has the real one.
"""

import ast
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import tiny
from batches import SCORES, engine, prompts
from fastppo import PPOEngine, Prompts, Rollout, Sampling, models
from fastppo.checks import RolloutError
from fastppo.config import MemoryConfig, VLLMConfig
from fastppo.data import select
from fastppo.rollout import VLLMEngine, vllm, weights
from fastppo.rollout import vllm_server as vllm_server_module
from fastppo.rollout.vllm_command import described, shell, start_command
from fastppo.score import action_logprobs
from vllm_protocol import Server, vllm_server_fixture  # noqa: F401

ENDS = (3, 17, 30, 31, 38)
Serve = Callable[..., Server]
DRAWN = Sampling(temperature=0.8, max_new_tokens=12, seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("BACKOFF_S", "POLL_S"):
        monkeypatch.setattr(vllm, name, 0.01)
    yield


def settings(folder: Path, *servers: Server, **changes: Any) -> VLLMConfig:
    return VLLMConfig(
        servers=tuple(s.url for s in servers), folder=str(folder), **{"wait_s": 20.0, "timeout_s": 30.0, **changes}
    )


def sampler(folder: Path, *servers: Server, **changes: Any) -> VLLMEngine:
    return VLLMEngine(tiny.policy("qwen2"), eos_token_ids=ENDS, config=settings(folder, *servers, **changes))


def trainer(folder: Path, *servers: Server, rollout: Any = None, **kwargs: Any) -> PPOEngine:
    config = {"engine": "vllm", "vllm": settings(folder, *servers), **(rollout or {})}
    return engine(tiny.policy("qwen2"), rollout=config, **kwargs)


def responses(rollout: Rollout) -> list[list[int]]:
    return [response for _, response in rollout.sequences()]


def gap(made: VLLMEngine, rollout: Rollout) -> float:
    assert rollout.logprobs is not None and rollout.sampling is not None
    temperature = rollout.sampling.temperature
    ours = action_logprobs(made.policy, rollout, temperature=temperature, max_tokens=400)
    return float((ours - rollout.logprobs).abs().max())


@pytest.mark.parametrize("count", [1, 3])
def test_every_request_is_answered_with_the_policy_s_log_probs(count: int, vllm_server: Serve, tmp_path: Path) -> None:
    servers = [vllm_server() for _ in range(count)]
    made = sampler(tmp_path, *servers)
    given = replace(prompts(11), limits=tuple(1 + i % 9 for i in range(11)), records=tuple({"n": i} for i in range(11)))
    rollout = made.generate(given, replace(DRAWN, samples_per_prompt=2))
    assert gap(made, rollout) <= 1e-5 and not rollout.exact and rollout.policy_version == 0
    assert rollout.group_ids.tolist() == [i for i in range(11) for _ in range(2)]
    assert [tuple(p) for p, _ in rollout.sequences()] == [p for p in given.token_ids for _ in range(2)]
    assert [r["n"] for r in rollout.records] == rollout.group_ids.tolist()
    for i, (response, reason) in enumerate(zip(responses(rollout), rollout.finish_reasons, strict=True)):
        assert reason == ("stop" if response[-1] in ENDS else "length") and not {*response[:-1]} & {*ENDS}
        assert reason == "stop" or len(response) == given.limits[i // 2]
    assert {len(s.asked) > 0 for s in servers} == {True} and sum(len(s.asked) for s in servers) == 22


def test_a_draw_follows_from_seed_prompt_and_rank(vllm_server: Serve, tmp_path: Path) -> None:
    """Whatever the order and the number of servers, and twice the same prompt draws twice."""
    given = Prompts(token_ids=(*prompts(8).token_ids, (1, 2), (1, 2)))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    one = responses(sampler(tmp_path, vllm_server()).generate(given, DRAWN))
    two = sampler(tmp_path, vllm_server(), vllm_server())
    other = responses(two.generate(select(given, order), DRAWN))
    assert {tuple(r) for r in other} == {tuple(r) for r in one} and one[8] != one[9]
    assert [r for r, i in zip(other, order, strict=True) if i < 8] == [one[i] for i in order if i < 8]
    assert responses(two.generate(given, replace(DRAWN, seed=4))) != one


def test_every_update_reaches_every_server(vllm_server: Serve, tmp_path: Path) -> None:
    """And only once: what a server has it is not sent again."""
    servers = [vllm_server(), vllm_server()]
    made = trainer(tmp_path, *servers, optimizer={"lr": 1e-2})
    for step in range(3):
        rollout = made.generate(prompts(8, seed=step))
        metrics = made.update(made.score(rollout, SCORES))
        assert rollout.policy_version == step and metrics["rollout/staleness"] == 0
        assert metrics["rollout/logprob_gap_max"] <= 1e-5 and metrics["val/ratio_max_first"] == 1.0
        assert "rollout/importance_weight_mean" not in metrics  # the gap is rounding
    made.generate(prompts(4), Sampling(seed=1))
    made.generate(prompts(4), Sampling(seed=2))
    for server in servers:
        assert server.pushes == 4 and server.version.endswith(":3")
        assert {server.calls.count(path) for path in ("/pause", "/reset_prefix_cache", "/resume")} == {4}
    assert len({body["cache_salt"] for body in servers[0].asked}) == 4


@pytest.mark.parametrize("fault", ["hang up", "busy", "short", "abort", "other prompt", "no version"])
def test_a_fault_that_passes_changes_nothing(fault: str, vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    made = sampler(tmp_path, server)
    expected = made.generate(prompts(6), DRAWN)
    server.faults = [fault, "", fault, fault]
    rollout = made.generate(prompts(6), DRAWN)
    assert responses(rollout) == responses(expected) and len(server.asked) == 6 + 6 + 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", r"a request failed 3 times; the last time: http.* answered 500: .*busy"),
        ("short", r"failed 3 times; .* gave 12 of 12 tokens, then 'length'"),
        ("abort", r"failed 3 times; .* gave 1 of 12 tokens, then 'abort'"),
        ("no version", r"answered with weights \[\], not '.*:0'"),
        ("refuse", r"answered 400: .*refuse.*\n`fastppo doctor` prints how a server"),
    ],
)
def test_a_fault_that_stays_is_an_error_with_its_reason(
    fault: str, message: str, vllm_server: Serve, tmp_path: Path
) -> None:
    made = VLLMEngine(tiny.policy("qwen2"), config=settings(tmp_path, vllm_server(faults=[fault] * 99), retries=2))
    with pytest.raises(RolloutError, match=message):
        made.generate(prompts(4), DRAWN)


def test_a_server_that_restarts_gets_the_weights_again(vllm_server: Serve, tmp_path: Path) -> None:
    """Between two rollouts, and with requests under way: what the dummy weights drew is not taken."""
    server = vllm_server()
    made = sampler(tmp_path, server)
    expected = responses(made.generate(prompts(6), DRAWN))
    server.restart()
    assert responses(made.generate(prompts(6), DRAWN)) == expected and server.pushes == 2
    answered, generate = len(server.asked), server.generate

    def restarts(body: Any) -> Any:
        if len(server.asked) == answered + 3:
            server.restart()
        return generate(body)

    server.generate = restarts
    rollout = made.generate(prompts(6), DRAWN)
    assert responses(rollout) == expected and server.pushes == 3 and len(server.asked) > answered + 6


def test_the_servers_of_a_policy_with_adapters_get_them_merged(vllm_server: Serve, tmp_path: Path) -> None:
    """W + B A * alpha / rank, and nothing that a server could take for a weight; it draws what the policy draws."""
    server = vllm_server()
    policy = models.adapt(tiny.policy("qwen2"), MemoryConfig(share="lora", lora_rank=4))
    config = {"engine": "vllm", "vllm": settings(tmp_path, server)}
    made = engine(policy, rollout=config, optimizer={"lr": 1e-2})
    for step in range(2):
        metrics = made.update(made.score(made.generate(prompts(8, seed=step)), SCORES))
        assert metrics["rollout/logprob_gap_max"] <= 1e-5
    sampling_engine: Any = made.rollout_engine
    left = load_file(sampling_engine.weights.current / "model.safetensors")
    base = {name: w for name, w in models.bare(policy).state_dict().items() if name != "lm_head.weight"}
    assert left.keys() == base.keys()
    changed, layers = 0, cast("Iterator[tuple[str, Any]]", policy.named_modules())
    for name, layer in layers:
        if hasattr(layer, "lora_A"):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            torch.testing.assert_close(left[f"{name}.weight"], base.pop(f"{name}.weight") + delta, atol=1e-6, rtol=0)
            changed += float(delta.detach().abs().max()) > 1e-4
    assert changed == 14 and all(torch.equal(left[name], w) for name, w in base.items())


def test_the_prefix_cache_is_reset_or_the_run_stops(
    vllm_server: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server_module, "CACHE_TRIES", 4)
    server = vllm_server(cache_busy=3)
    made = sampler(tmp_path, server, retries=0)
    made.generate(prompts(2), DRAWN)
    assert server.calls.count("/reset_prefix_cache") == 4
    server.cache_busy = 10**6
    made.sync_weights(made.policy, 1)
    with pytest.raises(RolloutError, match="failed 1 times; .* did not reset its prefix cache in 4 tries"):
        made.generate(prompts(2), DRAWN)


def test_stop_sequences_end_a_response(vllm_server: Serve, tmp_path: Path) -> None:
    made = VLLMEngine(tiny.policy("qwen2"), config=settings(tmp_path, vllm_server()))
    free = made.generate(prompts(10), DRAWN)
    stops = tuple(tuple(r[4:6]) for r in responses(free)[:3])
    rollout = made.generate(prompts(10), replace(DRAWN, stop_sequences=stops))
    for long, cut, reason in zip(responses(free), responses(rollout), rollout.finish_reasons, strict=True):
        ends = [i + 2 for i in range(len(long) - 1) if tuple(long[i : i + 2]) in stops]
        assert cut == long[: min([*ends, 12])] and reason == ("stop" if ends else "length")
    assert gap(made, rollout) <= 1e-5 and "stop" in rollout.finish_reasons


def test_a_context_that_the_server_does_not_have_is_refused(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    made = sampler(tmp_path, server)
    with pytest.raises(ValueError, match=rf"make 72 tokens, more than the --max-model-len 64 of {server.url}"):
        made.generate(Prompts(token_ids=((1,) * 60,)), DRAWN)


def test_servers_sleep_between_rollouts(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    made = sampler(tmp_path, server, sleep=True)
    for version in range(2):
        made.sync_weights(made.policy, version)
        assert gap(made, made.generate(prompts(3), DRAWN)) <= 1e-5  # the server asserts that it is awake
        assert server.asleep


def test_ranks_do_not_share_a_server(vllm_server: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [vllm_server() for _ in range(3)]
    monkeypatch.setattr("fastppo.distributed.world_size", lambda: 2)
    monkeypatch.setattr("fastppo.distributed.rank", lambda: 1)
    assert [s.url for s in sampler(tmp_path, *servers).servers] == [servers[1].url]
    with pytest.raises(ValueError, match="has 1 servers for 2 ranks"):
        sampler(tmp_path, servers[0])


def test_weights_on_disk_are_one_copy_and_go_with_the_engine(vllm_server: Serve, tmp_path: Path) -> None:
    left = tmp_path / f"{weights.PREFIX}killed"
    left.mkdir()
    (left / ".lock").touch()
    made = sampler(tmp_path, vllm_server())
    assert left.exists()  # it may be being made
    for version in range(3):
        made.sync_weights(made.policy, version)
    assert [p.parent.name for p in tmp_path.rglob("*.safetensors")] == ["2"]
    os.utime(left, (0.0, 0.0))
    other = sampler(tmp_path, vllm_server())
    assert not left.exists() and made.weights.folder.exists()
    folder = made.weights.folder
    del made
    assert not folder.exists() and other.weights.folder.exists()
    with pytest.raises(ValueError, match="cannot leave weights in rollout.vllm.folder = '.*nowhere'"):
        sampler(tmp_path / "nowhere", vllm_server())


@pytest.mark.parametrize(
    "fault", [{"loads": False}, {"stale_head": True}, {"temperature": 0.9}, {"temperature": 1.2}], ids=str
)
def test_a_silent_mismatch_stops_the_run_before_it_trains(fault: Any, vllm_server: Serve, tmp_path: Path) -> None:
    """The server says that all is well each time. A head that stays is its own until the policy has moved."""
    server = vllm_server()
    made = trainer(tmp_path, server, optimizer={"lr": 1e-2})
    made.update(made.score(made.generate(prompts(8)), SCORES))
    for name, value in fault.items():
        setattr(server, name, value)
    before = [p.detach().clone() for p in made.policy.parameters()]
    rollout = made.generate(prompts(8, seed=1))
    assert rollout.policy_version == 1
    with pytest.raises(RolloutError, match=r"nats a token off the trainer's .* it has old weights or a part of them"):
        made.score(rollout, SCORES)
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.parameters(), strict=True))


def test_between_the_limits_tokens_are_weighted(vllm_server: Serve, tmp_path: Path) -> None:
    made = trainer(tmp_path, vllm_server(temperature=1.0003))
    experience = made.score(made.generate(prompts(8)), SCORES)
    assert 1e-4 < experience.metrics["rollout/logprob_gap_mean"] < 1e-3
    assert experience.logprobs is not None and experience.rollout.logprobs is not None
    expected = (experience.logprobs - experience.rollout.logprobs).exp()
    torch.testing.assert_close(experience.is_weights, expected, atol=1e-6, rtol=0)
    assert 0.99 < made.update(experience)["rollout/importance_weight_mean"] < 1.01


def test_the_start_command_finds_the_worker_and_hides_no_package() -> None:
    environment, arguments = start_command("POLICY", cpu=True)
    folder = Path(environment["PYTHONPATH"])
    assert [path.name for path in folder.glob("*.py")] == ["fastppo_worker.py"]
    named = arguments[arguments.index("--worker-extension-cls") + 1].removeprefix("fastppo_worker.")
    tree = ast.parse((folder / "fastppo_worker.py").read_text())
    assert named in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert shell(environment, arguments) in "\n".join(described())
