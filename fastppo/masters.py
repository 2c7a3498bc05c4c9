"""What an optimizer steps in place of a parameter, always float32, and how the parameter gets the result.

An update of 1e-6 to a bfloat16 weight of 1 is lost to rounding every time. Its gradients are therefore added up in
float32, and its optimizer steps a float32 master: one that stays, on the device or in host memory, or one that is made
for the step and rounded up or down at random, so that on average nothing is lost.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastppo.config import OptimizerConfig


@dataclass
class Weight:
    """One parameter that learns."""

    parameter: nn.Parameter  # what the model reads
    master: Tensor  # float32, what the optimizer steps; without memory between steps where `rounds`
    gradient: Tensor  # its .grad is float32 and adds up the micro-batches; the parameter or the master where they can
    rounds: bool  # at random, to a bfloat16 parameter that is all there is

    @property
    def kept(self) -> Tensor:
        """What a checkpoint must hold."""
        return self.parameter if self.rounds else self.master

    def take_gradient(self, parameter: Tensor) -> None:
        """Add a micro-batch's bfloat16 gradient, as soon as it is there."""
        if parameter.grad is None:
            raise RuntimeError("two engines train one bfloat16 model: each takes over its gradients; build one engine")
        so_far = self.gradient.grad
        self.gradient.grad = parameter.grad.float() if so_far is None else so_far.add_(parameter.grad)
        parameter.grad = None

    @property
    def waits(self) -> bool:
        """Whether the optimizer steps it by itself, when its master and gradient are brought together."""
        return self.gradient is not self.master

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, gradient: Tensor, seed: object) -> None:
        """A step of this weight alone; `gradient` is where the master is."""
        if self.rounds:
            self.master.data = self.parameter.detach().float()
        self.master.grad = gradient
        optimizer.step()
        self.master.grad = None
        if self.rounds:
            self.parameter.copy_(stochastically_rounded(self.master.detach(), seed))
            self.master.data = self.master.new_empty(0)
        else:
            self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the parameter what its master has become."""
        if self.rounds or self.parameter is self.master:
            return
        if self.master.device == self.parameter.device:
            self.parameter.copy_(self.master)
        else:
            staged = torch.empty_like(self.master, dtype=self.parameter.dtype, pin_memory=True).copy_(self.master)
            self.parameter.copy_(staged, non_blocking=True)


def make_weight(parameter: nn.Parameter, config: OptimizerConfig) -> Weight:
    """The master of `parameter` as `config` has it. A bfloat16 parameter's own .grad is from then on always None."""
    exact, on_host = parameter.dtype == torch.float32, config.kind == "adamw-cpu-offload"
    rounds = config.masters == "stochastic" and not exact
    if rounds:
        master = torch.empty(0, device=parameter.device)
    elif on_host:
        master = torch.empty_like(parameter, dtype=torch.float32, device="cpu", pin_memory=parameter.is_cuda)
        master = master.detach().copy_(parameter.detach())
    else:
        master = parameter if exact else parameter.detach().float()
    if exact:
        return Weight(parameter, master, parameter, rounds)
    weight = Weight(parameter, master, _shape_of(parameter) if rounds or on_host else master, rounds)
    parameter.register_post_accumulate_grad_hook(weight.take_gradient)
    return weight


def gradients_where_masters_are(weights: Iterable[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """Every weight that has a gradient, with it; while one is used, the next one's is on its way to the host."""
    under_way: deque[tuple[Weight, Tensor, torch.cuda.Event | None]] = deque()
    for weight in weights:
        if (gradient := weight.gradient.grad) is not None:
            under_way.append((weight, *_sent(gradient, weight.master.device)))
        if len(under_way) > 1:
            yield _arrived(*under_way.popleft())
    yield from (_arrived(*last) for last in under_way)


def stochastically_rounded(x: Tensor, seed: object) -> Tensor:
    """float32 `x` as bfloat16, up or down with the probabilities that make `x` the expected value.

    bfloat16 is the upper half of float32's bits, which takes what the lower half and a uniform number carry over.
    `seed`: of those numbers, by what it prints as; the global generator is not touched.
    """
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest) >> 1)
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    upper = (x.view(torch.int32) + noise).bitwise_and_(-1 << 16)
    return upper.view(torch.float32).bfloat16()


def _shape_of(parameter: Tensor) -> Tensor:
    """Something float32 of the parameter's shape and device to hang a gradient on, of 4 bytes."""
    return torch.zeros(1, device=parameter.device).expand(parameter.shape)


def _sent(gradient: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """The gradient on `device`, there as soon as the event has happened."""
    if gradient.device == device:
        return gradient, None
    there = torch.empty_like(gradient, device=device, pin_memory=True).copy_(gradient, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(gradient.device))  # which is the copy's; another GPU may be the current one
    return there, event


def _arrived(weight: Weight, gradient: Tensor, event: torch.cuda.Event | None) -> tuple[Weight, Tensor]:
    if event is not None:
        event.synchronize()
    return weight, gradient
