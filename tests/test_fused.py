"""Fused kernels of layers: the same numbers but for rounding, for one model and no other."""

import importlib
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch._dynamo.utils import counters
from triton.runtime import interpreter

import runs
import tiny
from batches import SCORES, engine, prompts, trajectories
from fastppo import LayersConfig, models
from fastppo.attention import dense_attention
from fastppo.microbatch import gather
from fastppo.models import fused, native_layers
from fastppo.run import build
from fastppo.score import action_logprobs
from fastppo.trainer import train
from numerics import assert_as_accurate

ROWS = ([0, 1, 2, 3], [6], [2, 5], [0, 1, 2, 3, 4, 5, 6, 7], [1, 1], [7, 2, 5], [1])  # micro-batches of all shapes
SHAPES = 2  # of which all kinds are: several sequences, and one, whose attention is not padded


def pass_through(model: Any, sequences: list[int]) -> dict[str, Tensor]:
    """Hidden states, and the gradients of all parameters one after the other."""
    model.zero_grad()
    hidden = models.hidden_states(model, gather(trajectories(), sequences))
    hidden.square().mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"hidden": hidden.detach(), "gradients": torch.cat(gradients)}


def assert_same_numbers(changed: Any, architecture: str, layers: LayersConfig, sequences: list[int]) -> None:
    """By the rule of tests/numerics.py."""
    plain = pass_through(tiny.policy(architecture, layers=layers), sequences)
    truth = pass_through(tiny.policy(architecture, layers=layers).double(), sequences)
    for name, found in pass_through(changed, sequences).items():
        assert_as_accurate(name, found, plain[name], truth[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_fit_every_micro_batch_and_keep_the_ratio_at_1(checkpointing: bool) -> None:
    layers = tiny.LAYERS[checkpointing]
    torch._dynamo.reset()
    counters.clear()
    policy = tiny.policy(layers=layers)
    models.fuse_layers(policy, LayersConfig(fused="compile"))
    compiled = []
    for sequences in ROWS:
        assert_same_numbers(policy, "llama", layers, sequences)
        compiled.append(counters["stats"]["unique_graphs"])
    assert 0 < compiled[SHAPES - 1] == compiled[-1] <= 16
    made = engine(policy)
    logged = made.update(made.score(made.generate(prompts()), SCORES))
    assert logged["val/ratio_max_first"] == 1.0
    with dense_attention(policy):
        assert policy.config._attn_implementation != fused.UNTRACED
    assert policy.config._attn_implementation == fused.UNTRACED


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_layer_is_inside_its_checkpoint(checkpointing: bool) -> None:
    """Whether transformers puts the checkpoint around a layer's call, as 5.17 does, or around its forward."""
    layers = tiny.LAYERS[checkpointing]
    policy, calls = tiny.policy(layers=layers), Counter()
    models.fuse_layers(policy, LayersConfig(fused="compile"))
    for i, layer in enumerate(policy.base_model.layers):  # pyright: ignore[reportArgumentType]
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))  # pyright: ignore
    with torch.compiler.set_stance("force_eager"):
        assert_same_numbers(policy, "llama", layers, ROWS[0])
    assert calls == {0: 1 + checkpointing, 1: 1 + checkpointing}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_native_kernels_are_given_to_what_computes_their_formulas(architecture: str, checkpointing: Any) -> None:
    layers = LayersConfig(checkpointing=checkpointing)
    policy = tiny.policy(architecture, layers=layers)
    plain = pass_through(tiny.policy(architecture, layers=layers), ROWS[0])["hidden"]
    if architecture == "gpt2":
        with pytest.raises(ValueError, match="knows no layer of GPT2LMHeadModel"):
            models.fuse_layers(policy, LayersConfig(fused="native"))
        return
    models.fuse_layers(policy, LayersConfig(fused="native"))
    for sequences in ROWS:
        assert_same_numbers(policy, architecture, layers, sequences)
    assert not torch.equal(pass_through(policy, ROWS[0])["hidden"], plain)  # they did run
    assert torch.equal(pass_through(tiny.policy(architecture, layers=layers), ROWS[0])["hidden"], plain)  # nowhere else


def test_native_kernels_keep_the_ratio_at_1() -> None:
    policy = tiny.policy("qwen2")
    models.fuse_layers(policy, LayersConfig(fused="native"))
    made = engine(policy)
    logged = made.update(made.score(made.generate(prompts()), SCORES))
    assert logged["val/ratio_max_first"] == 1.0
    with dense_attention(policy):  # batches, and what rotates them
        policy.base_model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), use_cache=False)


def test_what_only_has_the_name_of_a_norm_keeps_its_own_formula() -> None:
    """And the other norms of the same model get the kernel."""
    policy = tiny.policy("qwen2")
    norm: Any = policy.get_submodule("model.norm")
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)
    models.fuse_layers(policy, LayersConfig(fused="native"))
    x = torch.randn(1, 3, 32)
    assert torch.equal(norm(x), 2 * forward(x))
    other: Any = policy.get_submodule("model.layers.0.input_layernorm")
    assert other.forward.__func__ is native_layers._norm


def test_native_kernels_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(ValueError, match="float32 models, and this one is torch.bfloat16"):
        models.fuse_layers(tiny.policy().bfloat16(), LayersConfig(fused="native"))
    with pytest.raises(ValueError, match="of kernels for CPUs"):
        models.fuse_layers(tiny.policy(), LayersConfig(fused="native"), torch.device("cuda"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, with what it lacks for Liger: scalars as a GPU gets them, and libdevice's rsqrt."""
    pytest.importorskip("liger_kernel", reason="pip install 'fastppo[liger]'")
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: 1 / tl.sqrt(x))
    plain = interpreter._implicit_cvt

    def converted(x: Any) -> Any:
        if not isinstance(x, float):
            return plain(x)
        return tl.core.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)


@pytest.mark.usefixtures("interpreted")
def test_ligers_kernels_are_given_to_one_model_alone() -> None:
    """With full checkpointing."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has it")
    layers = tiny.LAYERS[True]
    before = pass_through(tiny.policy("qwen2", layers=layers), ROWS[0])
    policy = tiny.policy("qwen2", layers=layers)
    fused.use_liger(policy)
    assert_same_numbers(policy, "qwen2", layers, ROWS[0])
    after = pass_through(tiny.policy("qwen2", layers=layers), ROWS[0])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(pass_through(policy, ROWS[0])["hidden"], before["hidden"])  # they did run
    scored = [action_logprobs(policy, trajectories(), temperature=1.0, max_tokens=n) for n in (100, 100)]
    assert torch.equal(*scored)


@pytest.mark.parametrize(("there", "said"), [(True, "on 'cpu': use 'compile' or 'none'"), (False, r"fastppo\[liger\]")])
def test_liger_needs_a_gpu_and_the_package(
    there: bool, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    ours = lambda name, *rest: (found("json") if there else None) if name == "liger_kernel" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", ours)
    with pytest.raises(ValueError, match=said):
        train(runs.config(tmp_path, layers={"fused": "liger"}))
    with pytest.raises(ValueError, match=said):
        models.fuse_layers(tiny.policy(), LayersConfig(fused="liger"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_waits_in_host_memory_is_fused_for_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reference or a critic that [offload] has sent away by then."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "liger_kernel" else name))
    given: list[Any] = []
    monkeypatch.setattr(fused, "use_liger", given.append)
    policy = tiny.policy()
    models.fuse_layers(policy, LayersConfig(fused="liger"), torch.device("cuda"))
    assert given == [policy] and policy.device.type == "cpu"


def test_a_run_fuses_every_model_for_its_own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastppo.memory.start.require_gpu", lambda config, device: None)
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(models, "fuse_layers", lambda *arguments: given.append(arguments))
    run = build(runs.config(tmp_path, offload={"reference": "move", "critic": "move"}))
    run.close()
    roles = (run.engine.policy, run.engine.critic, run.engine.reference)
    assert given == [(model, run.config.layers, run.engine.policy.device) for model in roles]


def test_native_kernels_are_not_given_to_what_looks_like_them() -> None:
    """Gates that are clamped where they are large, norms of another epsilon, positions of a part of a head."""

    class ClampedMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(16, 16) for _ in range(3))
            self.act_fn = torch.nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))

    class OtherRMSNorm(torch.nn.RMSNorm):
        variance_epsilon = 1e-6

    assert not native_layers._replace(ClampedMLP())
    assert not native_layers._replace(OtherRMSNorm(16, eps=1e-5)) and native_layers._replace(OtherRMSNorm(16, eps=1e-6))
    assert not native_layers._replace(torch.nn.RMSNorm(16))  # its epsilon is that of the dtype
    phi3 = importlib.import_module("transformers.models.phi3.modeling_phi3")
    qwen2 = importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    assert native_layers._is_rotary(qwen2.apply_rotary_pos_emb)
    assert not native_layers._is_rotary(phi3.apply_rotary_pos_emb)
