"""Decode steps in one call: what the modules compute, and only where the modules are what is known."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GraniteConfig, Qwen2Config, SmolLM3Config

import tiny
from batches import prompts
from fastppo import LayersConfig, MemoryConfig, Rollout, Sampling, models
from fastppo.rollout import decoder
from fastppo.rollout.embedded import EmbeddedEngine
from fastppo_kernels import native
from fastppo_kernels.native import isa as isas
from test_rollout import responses

KNOWN = {"llama": {}, "qwen2": {}, "qwen3": {}, "llama with biases": {"attention_bias": True}, "windows": {}}
SAMPLING = Sampling(max_new_tokens=20, seed=3)


def policy(kind: str = "llama", layers: LayersConfig | None = None) -> Any:
    torch.manual_seed(0)
    if kind == "windows":
        config = Qwen2Config(**tiny._SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    else:
        config = tiny.CONFIGS[kind.split()[0]]()
    for name, value in KNOWN.get(kind, {}).items():
        setattr(config, name, value)
    raw = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in raw.parameters():
            p.copy_(p * 5 if p.ndim == 2 else p + 0.3 * torch.randn_like(p))
    made = models.prepare_policy(raw)
    models.fuse_layers(made, layers or LayersConfig(fused="native"))
    return made


@pytest.fixture
def made_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What came of trying, in every call of `generate`."""
    found: list[Any] = []
    plain = decoder.layer_steps
    monkeypatch.setattr(decoder, "layer_steps", lambda *args: found.append(plain(*args)) or found[-1])
    return found


def drawn(model: Any, sampling: Sampling = SAMPLING, **options: Any) -> Rollout:
    return EmbeddedEngine(model, **{"eos_token_ids": (7,), "max_rows": 5, **options}).generate(prompts(12), sampling)


def modules_alone(model: Any) -> Rollout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "layer_steps", lambda *_: None)
        return drawn(model)


def assert_same(one: Rollout, other: Rollout) -> None:
    assert responses(one) == responses(other)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step in C++."""
    found: list[int] = []
    plain = native.DecoderLayers.step
    monkeypatch.setattr(
        native.DecoderLayers, "step", lambda self, x, *rest: found.append(len(x)) or plain(self, x, *rest)
    )
    return found


@pytest.mark.parametrize("isa", isas.available_isas())
@pytest.mark.parametrize("kind", KNOWN)
def test_they_draw_what_the_modules_draw(kind: str, isa: str, steps: list[int], monkeypatch: Any) -> None:
    """Rows end and others take their places; the first step, which is tried, is no other than the rest."""
    monkeypatch.setenv(isas.ISA_VARIABLE, isa)
    model = policy(kind)
    found = drawn(model)
    assert len(steps) > 10 and max(steps) == 5, "the first agreed, so the others follow"
    assert_same(found, modules_alone(model))


def test_every_call_reads_the_weights_of_now(made_steps: list[Any]) -> None:
    model = policy()
    engine = EmbeddedEngine(model, keep_memory=True)
    before = engine.generate(prompts(4), SAMPLING)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.mul_(-1)  # where it was
    model.base_model.layers[1].mlp.up_proj.weight.data = -model.base_model.layers[
        1
    ].mlp.up_proj.weight.data  # elsewhere
    after = engine.generate(prompts(4), SAMPLING)
    assert_same(after, EmbeddedEngine(model).generate(prompts(4), SAMPLING))
    assert responses(after) != responses(before) and None not in made_steps


def test_nothing_of_them_is_held_between_calls() -> None:
    engine = EmbeddedEngine(policy(), keep_memory=True)
    engine.generate(prompts(4), SAMPLING)
    assert engine._kept is not None and engine._kept.layer_steps is None


def scaled_branch(model: Any) -> None:
    """The residual of another architecture, by the same parts; later layers and steps read what it leaves."""
    attention = model.base_model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (plain(*args, **kwargs)[0] * 0.5, None)


def watched(model: Any) -> None:
    model.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)


def heard_backward(model: Any) -> None:
    model.base_model.layers[1].self_attn.o_proj.register_full_backward_hook(lambda *_: None)


def another_product(model: Any) -> None:
    up = model.base_model.layers[0].mlp.up_proj
    plain = up.forward
    up.forward = lambda x: 0.5 * plain(x)


def watched_layer(model: Any) -> None:
    model.base_model.layers[0].register_forward_pre_hook(lambda *_: None)


def watched_body(model: Any) -> None:
    model.base_model.register_forward_hook(lambda *_: None)


def another_parameter(model: Any) -> None:
    model.base_model.layers[0].gain = torch.nn.Parameter(torch.ones(1))


def another_layer(model: Any) -> None:
    layer = model.base_model.layers[0]
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)


@pytest.mark.parametrize(
    "change", [scaled_branch, watched, watched_layer, watched_body, another_parameter, another_layer]
)
def test_a_model_that_is_something_else_runs_as_it_is(change: Any, made_steps: list[Any]) -> None:
    model = policy()
    change(model)
    assert_same(drawn(model), modules_alone(model))
    assert made_steps == [None]


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_other_architectures_run_as_they_are(kind: str, made_steps: list[Any]) -> None:
    model = policy(kind, LayersConfig(fused="none"))
    assert_same(drawn(model), modules_alone(model))
    assert made_steps == [None]


LOOK_ALIKE = {
    "residuals that are scaled": GraniteConfig(**tiny._SHAPE, residual_multiplier=0.3, embedding_multiplier=4.0),
    "a layer without positions": SmolLM3Config(**tiny._SHAPE, no_rope_layers=[1, 0]),
}


@pytest.mark.parametrize("config", LOOK_ALIKE.values(), ids=LOOK_ALIKE)
def test_look_alikes_run_as_they_are(config: Any, made_steps: list[Any]) -> None:
    torch.manual_seed(0)
    model = models.prepare_policy(AutoModelForCausalLM.from_config(config))
    models.fuse_layers(model, LayersConfig(fused="native"))
    assert_same(drawn(model), modules_alone(model))
    assert made_steps == [None]


def test_a_first_step_that_differs_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the modules, which later steps read."""
    model = policy()
    expected = modules_alone(model)
    plain = native.DecoderLayers.__init__

    def other(self: Any, layers: Any) -> None:
        plain(self, [x._replace(weights=x.weights._replace(k=-x.weights.k)) for x in layers])

    monkeypatch.setattr(native.DecoderLayers, "__init__", other)
    assert_same(drawn(model), expected)


def plain_layer(inner: int = 8, heads: int = 2) -> native.Layer:
    H, D = 8, 4
    q, k, up = torch.zeros(8, H), torch.zeros(heads * D, H), torch.zeros(inner, H)
    weights = native.LayerWeights(
        *(torch.ones(H), q, None, k, None, k, None, None, None, q, None, torch.ones(H), up, up, up.T.contiguous())
    )
    memory = torch.zeros(3, heads, 6, D)
    return native.Layer(weights, native.LayerSettings(1e-6, 0.0, 1e-6, 0.5), memory, memory.clone())


def test_layers_of_several_shapes_are_refused() -> None:
    one = plain_layer()
    memory = one.keys
    for other in (plain_layer(inner=5), plain_layer(heads=1)):
        with pytest.raises(ValueError, match="must have one shape"):
            native.DecoderLayers([one, other])
    for bad, message in (
        (memory.double(), "keys must be a float32"),
        (memory.transpose(1, 2), "keys must be contiguous"),
        (memory[:2].clone(), "must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            native.DecoderLayers([one._replace(keys=bad)])


def test_plain_layers_run_as_they_are(made_steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(policy(layers=LayersConfig()))
    monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    drawn(policy())
    assert made_steps == [None, None]


def test_a_mode_that_looks_sees_every_operator(steps: list[int]) -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = policy()
    with Looks():
        found = drawn(model)
    assert not steps
    assert_same(found, drawn(model))


def test_adapters_run_as_they_are(made_steps: list[Any]) -> None:
    pytest.importorskip("peft", reason="pip install 'fastppo[lora]'")
    model = models.adapt(policy(), MemoryConfig(share="lora", lora_rank=4))
    drawn(model)
    assert made_steps == [None]


def test_a_position_outside_memory_is_named() -> None:
    x, angles = torch.ones(3, 8), torch.ones(3, 4)
    layers = native.DecoderLayers([plain_layer()])
    assert torch.equal(layers.step(x, angles, angles, torch.tensor([0, 2, 5]), 6), x)  # weights of zero add nothing
    for positions in ([0, 2, 6], [0, -1, 2]):
        with pytest.raises(ValueError, match=r"positions must lie in \[0, 6\), got"):
            layers.step(x, angles, angles, torch.tensor(positions), 6)
