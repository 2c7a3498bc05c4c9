"""One role's model with its AdamW and schedule. bfloat16 weights are trained through float32 masters.

An update of 1e-6 to a bfloat16 weight of 1 is lost to rounding every time, so the optimizer owns float32 copies,
gradients are added up in float32, and the model gets the rounded result.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import distributed
from fastppo.checks import require
from fastppo.config import OptimizerConfig


@dataclass
class Trainable:
    """A model that learns."""

    model: PreTrainedModel
    names: list[str]
    parameters: list[torch.nn.Parameter]
    masters: list[Tensor]  # the float32 tensors that the optimizer steps; a float32 parameter is its own
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    total_steps: int  # PPO iterations that the schedule spans
    iteration: int = 0
    skipped: int = 0  # steps not taken because loss or gradient was not finite
    skipped_in_a_row: int = 0
    fault: str = ""  # why the last step that was skipped in this iteration was, and in which tensor

    @property
    def rate(self) -> float:
        """Learning rate of this PPO iteration."""
        return self.config.lr * learning_rate_factor(self.config, self.total_steps, self.iteration)

    def step(self, loss: Tensor | float = 0.0) -> float:
        """Clip and step; a gradient or `loss` that is not finite leaves everything as it is.

        Returns:
            The gradient's norm, before clipping; NaN or infinity for a step that was skipped.
        """
        distributed.sum_gradients(self.masters)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        total = float(norm + 0 * loss)  # 0 * infinity is NaN: the device is asked once
        if total < math.inf:  # False for NaN too
            torch.nn.utils.clip_grads_with_norm_(self.masters, limit, norm)
            self.optimizer.step()
            self._publish()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.fault = self._fault(float(loss))
        self.zero_grad()
        return total

    def _fault(self, loss: float) -> str:
        """What is not finite: the loss, the first tensor of the gradient, or only the norm of all."""
        for name, master in zip(self.names, self.masters, strict=True):
            if master.grad is not None and (bad := int((~master.grad.isfinite()).sum())):
                return f"{bad} of {master.numel()} entries of the gradient of {name!r} are not finite (loss {loss:.3g})"
        return f"the loss is {loss}" if not math.isfinite(loss) else "the norm of the gradient is beyond float32"

    def next_iteration(self) -> None:
        """Move the schedule on: it counts PPO iterations, also those in which every step was skipped."""
        self.iteration += 1
        self.set_rate()

    def set_rate(self) -> None:
        """Give the optimizer the learning rate of this iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def zero_grad(self) -> None:
        """Drop the gradient accumulated so far."""
        self.optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None  # what a backward that failed has not yet given to its master

    def snapshot(self) -> list[Any]:
        """Weights and optimizer state, to `restore`."""
        state = [{k: _copied(v) for k, v in self.optimizer.state[m].items()} for m in self.masters]
        return [[m.detach().clone() for m in self.masters], state]

    @torch.no_grad()
    def restore(self, snapshot: list[Any]) -> None:
        """Bitwise back to where `snapshot` was taken."""
        for master, weight, state in zip(self.masters, *snapshot, strict=True):
            master.copy_(weight)
            self.optimizer.state[master] = {k: _copied(v) for k, v in state.items()}
        self._publish()

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer moments by parameter name: `<name>` and `<name>/<moment>`, not copied."""
        out: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            out[name] = master
            out |= {f"{name}/{key}": value for key, value in self.optimizer.state[master].items()}
        return out

    @torch.no_grad()
    def load(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """The inverse of `state`, one tensor at a time.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        masters, found = dict(zip(self.names, self.masters, strict=True)), set()
        for key, value in state:
            name, _, moment = key.partition("/")
            require(name in masters, f"the checkpoint has a parameter {name!r} that the model has not")
            master = masters[name]
            if moment:
                self.optimizer.state[master][moment] = value.to(master.device)
                continue
            shapes = f"{tuple(value.shape)} in the checkpoint and {tuple(master.shape)} in the model"
            require(value.shape == master.shape, f"parameter {name!r} has shape {shapes}")
            master.copy_(value)
            found.add(name)
        missing = [name for name in self.names if name not in found]
        require(not missing, f"the checkpoint lacks {len(missing)} parameters of the model, {missing[:3]} first")
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)


def make_trainable(model: PreTrainedModel, config: OptimizerConfig, total_steps: int) -> Trainable:
    """AdamW on every parameter that requires a gradient."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    masters = [p if p.dtype == torch.float32 else take_gradients(p) for p in parameters]
    optimizer = torch.optim.AdamW(
        masters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    trainable = Trainable(model, list(names), list(parameters), masters, optimizer, config, total_steps)
    trainable.set_rate()
    return trainable


def learning_rate_factor(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """Factor on the learning rate in PPO iteration `step`, from 0: positive in the first one (N+: 1 - step / total)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(step / total_steps, 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return warmup * decay[config.schedule]


def take_gradients(parameter: torch.nn.Parameter) -> Tensor:
    """A float32 copy that takes over each micro-batch's gradient as soon as it is there."""
    master = parameter.detach().float().requires_grad_()

    def take_gradient(p: Tensor) -> None:
        if p.grad is None:
            raise RuntimeError("two engines train one bfloat16 model: each takes over its gradients; build one engine")
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(take_gradient)
    return master


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
