"""One role's model with its AdamW and schedule. Whatever the weights' dtype, the optimizer steps float32 masters."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import distributed
from fastppo.adamw import make_adamw, placed, plain_tensors, set_rate, state_from
from fastppo.checks import require
from fastppo.config import OptimizerConfig
from fastppo.masters import Weight, gradients_where_masters_are, make_weight
from fastppo.offload.mover import Kept, Presence


@dataclass
class Trainable:
    """A model that learns."""

    model: PreTrainedModel
    weights: dict[str, Weight]  # by parameter name
    optimizer: torch.optim.Optimizer  # of their masters
    config: OptimizerConfig
    total_steps: int  # PPO iterations that the schedule spans
    iteration: int = 0
    skipped: int = 0  # steps not taken because loss or gradient was not finite
    skipped_in_a_row: int = 0
    fault: str = ""  # why the last step that was skipped in this iteration was, and in which tensor
    weights_at: Presence = field(default_factory=Kept)
    optimizer_at: Presence = field(default_factory=Kept)  # masters and moments

    @property
    def rate(self) -> float:
        """Learning rate of this PPO iteration."""
        return self.config.lr * learning_rate_factor(self.config, self.total_steps, self.iteration)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within it the role trains: all of it is on the device, masters and moments by the first step."""
        try:
            self.weights_at.arrive()
            self.optimizer_at.begin()
            yield
        finally:
            self.weights_at.leave(changed=True)
            self.optimizer_at.leave(changed=True)

    def step(self, loss: Tensor | float = 0.0) -> float:
        """Clip and step; a gradient or `loss` that is not finite leaves everything as it is.

        Returns:
            The gradient's norm, before clipping; NaN or infinity for a step that was skipped.
        """
        gradients = [w.gradient for w in self.weights.values()]
        distributed.sum_gradients(gradients)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = torch.nn.utils.get_total_norm([g.grad for g in gradients if g.grad is not None])
        total = float(norm + 0 * loss)  # 0 * infinity is NaN: the device is asked once
        if total < math.inf:  # False for NaN too
            torch.nn.utils.clip_grads_with_norm_(gradients, limit, norm)
            self.optimizer_at.arrive()
            self._step_weights()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.fault = self._fault(float(loss))
        self.zero_grad()
        return total

    def _fault(self, loss: float) -> str:
        """What is not finite: the loss, the first tensor of the gradient, or only the norm of all."""
        for name, grad in ((name, weight.gradient.grad) for name, weight in self.weights.items()):
            if grad is not None and (bad := int((~grad.isfinite()).sum())):
                return f"{bad} of {grad.numel()} entries of the gradient of {name!r} are not finite (loss {loss:.3g})"
        return f"the loss is {loss}" if not math.isfinite(loss) else "the norm of the gradient is beyond float32"

    def next_iteration(self) -> None:
        """Move the schedule on: it counts PPO iterations, also those in which every step was skipped."""
        self.iteration += 1
        self.set_rate()

    def set_rate(self) -> None:
        """Give the optimizer the learning rate of this iteration."""
        set_rate(self.optimizer, self.rate)

    def zero_grad(self) -> None:
        """Drop the gradient accumulated so far."""
        for weight in self.weights.values():
            weight.gradient.grad = None
            weight.parameter.grad = None  # what a backward that failed has not yet handed over

    def snapshot(self) -> dict[str, Tensor]:
        """Weights and optimizer state, to `restore`."""
        self.optimizer_at.arrive()
        return {name: x.clone() for name, x in self.state().items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Bitwise back to where `snapshot` was taken. It is empty afterwards: its moments are the optimizer's."""
        self.load((name, snapshot.pop(name)) for name in list(snapshot))

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer moments by parameter name: `<name>` and `<name>/<moment>`, not copied."""
        out: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            out[name] = weight.kept.detach()
            out |= {f"{name}/{key}": x for key, x in plain_tensors(self.optimizer.state.get(weight.master, {}))}
        return out

    def load(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """The inverse of `state`, one parameter at a time; moments are kept, not copied, where they are on the device.

        Args:
            state: a parameter and its moments one after the other, in any order.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        self.optimizer_at.arrive()
        missing = set(self.weights)
        for name, found in groupby(state, lambda item: item[0].partition("/")[0]):
            require(name in missing, f"the checkpoint has a parameter {name!r} that the model has not, or has it twice")
            missing.remove(name)
            self._load_weight(name, {key.partition("/")[2]: value for key, value in found})
        first = sorted(missing)[:3]
        require(not missing, f"the checkpoint lacks {len(missing)} parameters of the model, {first} first")

    @torch.no_grad()
    def _load_weight(self, name: str, found: dict[str, Tensor]) -> None:
        """One parameter, "", and its moments by name. The old moments are gone before there are new ones."""
        weight, value = self.weights[name], found.pop("", None)
        require(value is not None, f"the checkpoint lacks the parameter {name!r} itself, it has only its moments")
        assert value is not None
        shapes = f"{tuple(value.shape)} in the checkpoint and {tuple(weight.parameter.shape)} in the model"
        require(value.shape == weight.parameter.shape, f"parameter {name!r} has shape {shapes}")
        weight.kept.copy_(value)
        weight.publish()
        self.optimizer.state[weight.master] = {}
        kind, device = self.config.kind, weight.master.device
        moments = {moment: placed(moment, x, device, kind) for moment, x in found.items()}
        self.optimizer.state[weight.master] = state_from(moments, weight.parameter.shape, kind)

    def _step_weights(self) -> None:
        """Those that wait come one at a time, each with its master, its gradient and its moments."""
        waiting = [w for w in self.weights.values() if w.waits]
        if len(waiting) < len(self.weights):
            self.optimizer.step()
            for weight in self.weights.values():
                if not weight.waits:
                    weight.publish()
        states = self.optimizer.state.values() if waiting else ()  # on a GPU to read the count is to wait
        steps = next((int(s["step"]) for s in states if "step" in s), 0)
        for i, (weight, gradient) in enumerate(gradients_where_masters_are(waiting)):
            weight.step(self.optimizer, gradient, (steps, i))


def make_trainable(model: PreTrainedModel, config: OptimizerConfig, total_steps: int) -> Trainable:
    """AdamW on every parameter that requires a gradient.

    Raises:
        ValueError: the kind of optimizer needs a GPU or a package that is not there.
    """
    require(
        config.kind != "adamw-cpu-offload" or model.device.type == "cuda",
        "optimizer kind 'adamw-cpu-offload' moves what a GPU does not hold to the host, and this model is on "
        f"{model.device.type!r} already: use 'adamw'",
    )
    require(
        any(p.requires_grad for p in model.parameters()),
        f"nothing trains: no parameter of this {type(model).__name__} requires a gradient",
    )
    weights = {name: make_weight(p, config) for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_adamw([w.master for w in weights.values()], config)
    trainable = Trainable(model, weights, optimizer, config, total_steps)
    trainable.set_rate()
    return trainable


def learning_rate_factor(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """Factor on the learning rate in PPO iteration `step`, from 0: positive in the first one (N+: 1 - step / total)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(step / total_steps, 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return warmup * decay[config.schedule]
