"""Laws of a whole decoder layer in C++: its numbers and gradients, and when a model takes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import tiny
from batches import trajectories
from fastppo import LayersConfig, MemoryConfig, models
from fastppo.attention import plan
from fastppo.microbatch import gather
from fastppo.models import native_decoder
from fastppo_kernels.decoder_layer import decoder_layer
from fastppo_kernels.native import DecoderLayers, Layer, LayerSettings, LayerWeights
from fastppo_kernels.native import isa as isas
from numerics import assert_as_accurate, guarded
from test_layer_steps import (
    another_layer,
    another_parameter,
    another_product,
    heard_backward,
    policy,
    scaled_branch,
)

H, D, HEADS, KV, INNER = 24, 6, 4, 2, 40
SEQUENCES = (5, 1, 9)
N = sum(SEQUENCES)
SETTINGS = LayerSettings(1e-6, 1e-5, 1e-4, 0.3)


def problem(biases: bool, head_norms: bool) -> tuple[Any, LayerWeights]:
    """[x, cos, sin], weights."""
    shapes = {"q": (HEADS * D, H), "k": (KV * D, H), "v": (KV * D, H), "o": (H, HEADS * D)}
    shapes |= {"gate": (INNER, H), "up": (INNER, H), "down": (H, INNER), "input_norm": (H,), "inner_norm": (H,)}
    shapes |= {f"{name}_bias": shapes[name][:1] for name in "qkvo"} if biases else {}
    shapes |= {"q_norm": (D,), "k_norm": (D,)} if head_norms else {}
    made: Any = {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}
    angles = torch.randn(N, D)
    return [torch.randn(N, H), angles.cos(), angles.sin()], LayerWeights(
        **{name: made.get(name) for name in LayerWeights._fields}
    )


def plain(x: Tensor, cos: Tensor, sin: Tensor, w: Any, s: Any) -> Tensor:
    """By PyTorch's own functions, in any dtype."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else norm(x, weight, s.head_eps)
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    normed = norm(x, w.input_norm, s.eps)
    q = turned(F.linear(normed, w.q, w.q_bias).view(N, HEADS, D), w.q_norm)
    k = turned(F.linear(normed, w.k, w.k_bias).view(N, KV, D), w.k_norm)
    v = F.linear(normed, w.v, w.v_bias).view(N, KV, D)
    mixed = []
    for a, b, c in zip(*(y.split(SEQUENCES) for y in (q, k, v)), strict=True):
        b, c = (y.repeat_interleave(HEADS // KV, 1) for y in (b, c))
        ages = torch.arange(len(a))[:, None] - torch.arange(len(a))
        hidden = (ages < 0) | (ages >= (s.window or N))
        scores = torch.einsum("ihd,jhd->hij", a, b) * s.scale
        scores = s.softcap * torch.tanh(scores / s.softcap) if s.softcap else scores
        mixed.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), c))
    y = x + F.linear(torch.cat(mixed).flatten(1), w.o, w.o_bias)
    inner = norm(y, w.inner_norm, s.inner_eps)
    return y + F.linear(F.silu(F.linear(inner, w.gate)) * F.linear(inner, w.up), w.down)


def ours(*given: Any) -> Tensor:
    x, cos, sin, weights, settings = given
    ends = torch.tensor([0, *SEQUENCES], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return decoder_layer(x, cos, sin, ends, weights, settings)


def passes(
    layer: Callable[..., Tensor], given: Any, w: LayerWeights, s: LayerSettings, dz: Tensor
) -> dict[str, Tensor]:
    """z, and the gradients of x and the weights that are there."""
    there = {name: p.detach().clone().requires_grad_() for name, p in w._asdict().items() if p is not None}
    x = given[0].detach().clone().requires_grad_()
    z = layer(x, *given[1:], LayerWeights(**{name: there.get(name) for name in LayerWeights._fields}), s)  # pyright: ignore
    names = ["x", *there]
    return {"z": z.detach(), **dict(zip(names, torch.autograd.grad(z, [x, *there.values()], dz), strict=True))}


@pytest.mark.parametrize("isa", isas.available_isas())
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("biases", "head_norms"), [(False, False), (True, False), (False, True), (True, True)])
def test_numbers_and_gradients_are_those_of_the_formula(
    biases: bool, head_norms: bool, window: int | None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(isas.ISA_VARIABLE, isa)
    given, weights = problem(biases, head_norms)
    settings, dz = SETTINGS._replace(window=window), torch.randn(N, H)
    exact_weights = LayerWeights(*(None if p is None else p.double() for p in weights))  # pyright: ignore
    exact = passes(plain, [x.double() for x in given], exact_weights, settings, dz.double())
    rough = passes(plain, given, weights, settings, dz)
    found = passes(ours, [guarded(x) for x in given], weights, settings, dz)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert_as_accurate(name, x, rough[name], exact[name], atol=2e-6)
    with torch.no_grad():
        assert torch.equal(ours(*given, weights, settings), found["z"])


def test_frozen_weights_get_no_gradient_and_change_no_other() -> None:
    given, weights = problem(True, True)
    whole = passes(ours, given, weights, SETTINGS, torch.ones(N, H))
    leaves = {
        name: p.clone().requires_grad_(name in ("up", "v_bias", "k_norm")) for name, p in weights._asdict().items()
    }
    ours(*given, LayerWeights(**leaves), SETTINGS).sum().backward()
    for name, p in leaves.items():
        assert (p.grad is not None) == p.requires_grad
        assert p.grad is None or torch.equal(p.grad, whole[name])


def test_a_gradient_is_differentiated_once() -> None:
    (x, *angles), weights = problem(False, False)
    z = ours(x.requires_grad_(), *angles, weights, SETTINGS)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_zeros_prove_nothing() -> None:
    """A layer that adds nothing yet may do anything later."""
    model = tiny.policy()
    model.base_model.layers[0].self_attn.o_proj.weight.data.zero_()  # pyright: ignore
    model.base_model.layers[0].mlp.down_proj.weight.data.zero_()  # pyright: ignore
    models.fuse_layers(model, LayersConfig(fused="native"))
    assert [hasattr(x, "tried_natively") for x in model.base_model.layers] == [False, True]  # pyright: ignore


@pytest.mark.parametrize("name", LayerWeights._fields)
def test_a_shape_that_does_not_fit_is_named(name: str) -> None:
    given, weights = problem(True, True)
    bad = torch.cat([getattr(weights, name)] * 2, dim=-1)
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        ours(*given, weights._replace(**{name: bad}), SETTINGS)


def test_norms_may_lie_anywhere() -> None:
    given, weights = problem(False, True)
    norms = ("input_norm", "q_norm", "k_norm", "inner_norm")
    apart = {name: torch.stack([getattr(weights, name)] * 2, 1)[:, 0] for name in norms}
    assert torch.equal(ours(*given, weights._replace(**apart), SETTINGS), ours(*given, weights, SETTINGS))


def test_other_tensors_are_refused_by_name() -> None:
    (x, *angles), weights = problem(False, False)
    with pytest.raises(ValueError, match=r"x must be a float32 tensor on the CPU, got a Tensor of torch.float64"):
        ours(x.double(), *angles, weights, SETTINGS)
    with FakeTensorMode():
        fake = torch.zeros(H)
    with pytest.raises(ValueError, match=r"inner_norm must be .*, got a FakeTensor"):
        ours(x, *angles, weights._replace(inner_norm=fake), SETTINGS)


def decoded(given: list[Tensor], layers: list[tuple[LayerWeights, LayerSettings]]) -> Tensor:
    """Of the packed tokens, by a step for each: the longest sequence begins, and each other a step after the last."""
    (x, cos, sin), order = given, (2, 0, 1)
    starts = [sum(SEQUENCES[:i]) for i in order]
    memory = torch.full((2 * len(layers), len(order), KV, max(SEQUENCES), D), torch.nan)
    pairs = zip(layers, memory[0::2], memory[1::2], strict=True)
    stack, found = DecoderLayers([Layer(*layer, k, v) for layer, k, v in pairs]), torch.full((N, H), torch.nan)
    for t in range(max(SEQUENCES)):
        rows = [i for i, k in enumerate(order) if 0 <= t - i < SEQUENCES[k]]
        assert rows == [*range(len(rows))]
        at = [starts[i] + t - i for i in rows]
        wide = torch.stack([x[at]] * 2, -1)[..., 0]  # rows and columns apart
        found[at] = stack.step(wide.T.contiguous().T, cos[at], sin[at], torch.tensor([t - i for i in rows]), t + 1)
    return found


@pytest.mark.parametrize("isa", isas.available_isas())
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 2.0)])
@pytest.mark.parametrize(("biases", "head_norms"), [(False, False), (True, True)])
def test_decode_steps_are_those_of_the_formula(
    biases: bool, head_norms: bool, window: int | None, softcap: float | None, isa: str, monkeypatch: Any
) -> None:
    """Through two layers, whose settings differ, with what earlier steps left in memory."""
    monkeypatch.setenv(isas.ISA_VARIABLE, isa)
    (given, first), (_, second) = problem(biases, head_norms), problem(biases, head_norms)
    settings = SETTINGS._replace(window=window, softcap=softcap)
    layers = [(first, settings), (second, LayerSettings(1e-2, 1e-3, 0.1, 0.2))]

    def both(dtype: torch.dtype) -> Tensor:
        x, cos, sin = (x.to(dtype) for x in given)
        for weights, s in layers:
            x = plain(x, cos, sin, LayerWeights(*(None if p is None else p.to(dtype) for p in weights)), s)  # pyright: ignore
        return x

    assert_as_accurate("x", decoded(given, layers), both(torch.float32), both(torch.float64), atol=2e-6)


def test_what_a_step_cannot_read_is_refused() -> None:
    (x, cos, sin), weights = problem(True, True)
    memory = torch.zeros(N, KV, 4, D)
    layer = Layer(weights, SETTINGS, memory, memory.clone())
    with pytest.raises(ValueError, match="at least one layer"):
        DecoderLayers([])
    for name in LayerWeights._fields:
        bad = torch.cat([getattr(weights, name)] * 2, dim=-1)
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            DecoderLayers([layer._replace(weights=weights._replace(**{name: bad}))])
    with pytest.raises(ValueError, match="up must be given"):
        DecoderLayers([layer._replace(weights=weights._replace(up=None))])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="keys must have shape"):
        DecoderLayers([layer._replace(keys=memory[:, :1].contiguous(), values=memory[:, :1].contiguous())])
    step, positions = DecoderLayers([layer]).step, torch.zeros(N, dtype=torch.int64)
    for i, name in enumerate(("x", "cos", "sin", "positions")):
        given = [x, cos, sin, positions]
        given[i] = given[i].to("meta")
        with pytest.raises(ValueError, match=f"{name} must be .* on the CPU, got .*meta"):
            step(*given, span=4)


def test_what_a_layer_cannot_do_is_refused_and_no_tokens_are_none() -> None:
    (x, cos, sin), weights = problem(False, False)
    ends = torch.tensor([0, N], dtype=torch.int32)
    with pytest.raises(ValueError, match="softcap must be None"):
        decoder_layer(x, cos, sin, ends, weights, SETTINGS._replace(softcap=2.0))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 on the CPU, got .* on meta"):
        decoder_layer(x, cos, sin, ends.to("meta"), weights, SETTINGS)
    with pytest.raises(ValueError, match="x must have two dimensions"):
        decoder_layer(x[None], cos, sin, ends, weights, SETTINGS)
    with pytest.raises(ValueError, match="got D = 0"):
        decoder_layer(x, cos[:, :0], sin[:, :0], ends, weights, SETTINGS)
    assert decoder_layer(x[:0], cos[:0], sin[:0], ends[:1], weights, SETTINGS).shape == (0, H)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every layer that ran whole."""
    seen: list[int] = []
    plain = native_decoder.decoder_layer
    monkeypatch.setattr(native_decoder, "decoder_layer", lambda x, *rest: seen.append(len(x)) or plain(x, *rest))
    return seen


def hidden_and_gradients(model: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    hidden = models.hidden_states(model, gather(trajectories(), [0, 1, 2, 3]))
    hidden.square().mean().backward()
    return hidden.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_runs(model: Any, calls: list[int], whole: int) -> None:
    """So many layers run whole, and the numbers are those of the parts."""
    calls.clear()
    made = hidden_and_gradients(model)
    assert len(calls) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_decoder, "parts_of", lambda _: None)
        hidden, gradients = hidden_and_gradients(model)
    assert torch.equal(made[0], hidden), "a ratio of 1 whoever looks"
    torch.testing.assert_close(made[1], gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama with biases", "windows"])
def test_layers_of_known_parts_run_whole(kind: str, calls: list[int]) -> None:
    model = policy(kind)
    assert calls, "each is tried"
    assert_runs(model, calls, whole=2)


def test_wide_layers_have_the_bits_of_their_parts(calls: list[int]) -> None:
    """Sums of more than a block, with what they are added to."""
    shape: Any = tiny._SHAPE | {"hidden_size": 160, "intermediate_size": 300}
    config = LlamaConfig(**shape)
    model = models.prepare_policy(AutoModelForCausalLM.from_config(config))
    models.fuse_layers(model, LayersConfig(fused="native"))
    assert_runs(model, calls, whole=2)


@pytest.mark.parametrize("change", [scaled_branch, another_parameter, another_layer])
def test_what_is_not_known_when_layers_are_fused_is_left(change: Callable[[Any], None], calls: list[int]) -> None:
    model = tiny.policy()
    change(model)
    models.fuse_layers(model, LayersConfig(fused="native"))
    assert_runs(model, calls, whole=1)


def test_what_changes_afterwards_is_seen(calls: list[int]) -> None:
    model = policy()
    heard: list[int] = []
    handle = model.base_model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: heard.append(1))
    assert_runs(model, calls, whole=1)
    assert len(heard) == 2
    handle.remove()
    assert_runs(model, calls, whole=2)
    for change in (another_layer, another_product, scaled_branch, heard_backward):
        model = policy()
        change(model)
        assert_runs(model, calls, whole=1)


def test_numbers_that_change_afterwards_are_seen(calls: list[int]) -> None:
    def set_to(part: str, name: str, value: float) -> Callable[[Any], None]:
        return lambda layer: setattr(layer.get_submodule(part) if part else layer, name, value)

    for change, whole in (
        (set_to("input_layernorm", "variance_epsilon", 1.0), 2),
        (set_to("post_attention_layernorm", "variance_epsilon", 1.0), 2),
        (set_to("self_attn", "scaling", 0.01), 1),
        (set_to("self_attn", "sliding_window", 2), 1),
    ):
        model = policy("windows")
        before = hidden_and_gradients(model)[0]
        change(model.base_model.layers[0])
        assert not torch.equal(hidden_and_gradients(model)[0], before)
        assert_runs(model, calls, whole=whole)


def test_a_cache_that_is_asked_for_is_filled() -> None:
    model, cache = policy(), DynamicCache()
    model(torch.zeros(1, 7, dtype=torch.int64), packing=plan([3, 4]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 7


def test_adapters_and_what_is_computed_again_go_through_the_modules(calls: list[int]) -> None:
    for checkpointing in ("full", "selective"):
        model = tiny.policy(layers=LayersConfig(checkpointing=checkpointing))
        models.fuse_layers(model, LayersConfig(checkpointing=checkpointing, fused="native"))
        assert_runs(model, calls, whole=0)
    pytest.importorskip("peft", reason="pip install 'fastppo[lora]'")
    assert_runs(models.adapt(policy(), MemoryConfig(share="lora", lora_rank=4)), calls, whole=0)
