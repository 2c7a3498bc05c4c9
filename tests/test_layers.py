"""What layers keep for the backward pass changes memory and time, and no number."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import runs
import tiny
from batches import SCORES, engine, largest_gap, recorded_gradients, trajectories, weights, with_random_head
from fastppo import LayersConfig, models
from fastppo.config import MemoryConfig
from fastppo.memory.ledger import dry_run
from fastppo.memory.load import Load
from fastppo.memory.passes import Model
from fastppo.microbatch import gather
from fastppo.trainer import train

SHAPES = Path(__file__).parent.parent / "fastppo" / "bench" / "shapes"
FULL, SELECTIVE = LayersConfig(checkpointing="full"), LayersConfig(checkpointing="selective")
EVERY_SECOND = LayersConfig(checkpointing="full", checkpoint_every=2)
RECOMPUTING = {"full": FULL, "selective": SELECTIVE, "every second": EVERY_SECOND}

COSTLY = (  # on a CPU
    *("aten::mm", "aten::addmm", "fastppo::product"),
    "fastppo::packed_attention",
)


class Operators(TorchDispatchMode):
    """Counts what runs, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def costly(self) -> int:
        return sum(self.counts[name] for name in COSTLY)


def one_step(layers: LayersConfig, architecture: str, share: str) -> list[dict[str, torch.Tensor]]:
    """Gradients and weights of policy and critic after an update of two epochs."""
    policy = tiny.policy(architecture, layers=layers)
    if share == "lora":
        pytest.importorskip("peft")
        policy = models.adapt(policy, MemoryConfig(share="lora", lora_rank=4))
    made = engine(policy, critic=models.critic_from(policy, layers=layers), ppo={"num_epochs": 2})
    found = recorded_gradients(with_random_head(made))
    made.update(made.score(trajectories(), SCORES))
    return [found, weights(made.policy), weights(made.critic)]


@pytest.mark.parametrize("share", ["none", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_recomputed_gradients_are_those_of_keeping_everything_bit_for_bit(architecture: str, share: str) -> None:
    plain = one_step(LayersConfig(), architecture, share)
    assert len(plain[0]) > 20
    for name, layers in RECOMPUTING.items():
        for kept, recomputed in zip(plain, one_step(layers, architecture, share), strict=True):
            assert largest_gap(kept, recomputed) == 0, name


def ran(layers: LayersConfig, architecture: str = "llama") -> Operators:
    """A forward and a backward of 8 sequences."""
    model, batch = tiny.policy(architecture, layers=layers), gather(trajectories(), range(8))
    with Operators() as seen:
        models.hidden_states(model, batch).square().sum().backward()
    return seen


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_selective_checkpointing_runs_no_product_twice_and_the_rest_again(architecture: str) -> None:
    plain, selective, full = (ran(layers, architecture) for layers in (LayersConfig(), SELECTIVE, FULL))
    assert plain.costly == selective.costly < full.costly
    names = ("aten::silu", "aten::tanh", "aten::rsqrt", "aten::native_layer_norm")
    cheap = [name for name in names if plain.counts[name]]
    assert cheap and all(selective.counts[name] == full.counts[name] > plain.counts[name] for name in cheap)


def test_every_nth_layer_is_computed_again_from_the_first_on() -> None:
    model = tiny.policy(layers=EVERY_SECOND)
    calls: Counter[int] = Counter()
    for i, layer in enumerate(model.base_model.layers):  # pyright: ignore[reportArgumentType]
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))  # pyright: ignore
    models.hidden_states(model, gather(trajectories(), range(8))).sum().backward()
    assert calls == {0: 2, 1: 1}


def test_recomputing_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    for layers in RECOMPUTING.values():
        model = tiny.policy(layers=layers)
        torch.set_rng_state(before)
        models.hidden_states(model, gather(trajectories(), range(8))).sum().backward()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings",
    [
        *({"checkpoint_every": 2}, {"offload_activations": True}, {"checkpointing": "full", "checkpoint_every": 0}),
        *({"checkpointing": "selective", "fused": fused} for fused in ("liger", "compile")),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers.checkpoint"):
        LayersConfig(**settings)


def test_activations_of_a_cpu_are_not_offloaded(tmp_path: Path) -> None:
    layers = {"checkpointing": "full", "offload_activations": True}
    with pytest.raises(ValueError, match="layers.offload_activations .* 'cpu' already: set it to false"):
        train(runs.config(tmp_path, layers=layers))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("every", [1, 2])
def test_activations_go_to_the_host_once_per_layer_that_recomputes(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without pinned memory, which it has not; gradients bit for bit."""
    sent: list[torch.Size] = []

    class Unpinned(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            super().__init__(self.send, lambda x: x)

        def send(self, x: torch.Tensor) -> torch.Tensor:
            sent.append(x.shape)
            return x.clone()

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Unpinned)
    offload = LayersConfig(checkpointing="full", checkpoint_every=every, offload_activations=True)
    batch, found = gather(trajectories(), range(8)), []
    for layers in (LayersConfig(), offload):
        model = tiny.policy(layers=layers)
        models.hidden_states(model, batch).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert largest_gap(*found) == 0
    assert len(sent) == 2 // every and {shape[-1] for shape in sent} == {model.config.hidden_size}


def planned(layers: LayersConfig) -> int:
    """Bytes that a forward of 4096 tokens through 8 layers like Qwen2.5-0.5B's leaves, as a GPU has them."""
    config: Any = models.read_config(str(SHAPES / "qwen2.5-0.5b"), False)
    config.num_hidden_layers, config.layer_types, config.vocab_size = 8, config.layer_types[:8], 1000
    model = Model(config=config, kind="policy", dtype="bfloat16", device=torch.device("cuda"), layers=layers)
    batch = Load(4, 512, 512).batch(model.device)
    with dry_run() as ledger:
        made = model.outline(ledger)
        with ledger.labelled("kept"):
            hidden = models.hidden_states(made, batch)
        assert hidden.requires_grad
        return ledger.live["kept"]


def test_the_plan_knows_every_kind() -> None:
    everything, second, selective, full = (planned(x) for x in (LayersConfig(), EVERY_SECOND, SELECTIVE, FULL))
    assert full < 0.3 * selective < 0.3 * 0.6 * everything
    assert second == pytest.approx((everything + full) / 2, rel=0.01)
    away = planned(LayersConfig(checkpointing="full", offload_activations=True))
    assert full - away == 8 * 4096 * 896 * 2  # layers, tokens, width, bytes of a number
