"""Tensors that wait in host memory and are on a device for as long as they are used.

Only `.data` changes place: parameters, and the states that an optimizer keeps of them, stay the objects they are. Each
has one place to wait in, made once; while the tensor is on the device, what is there is its value before it came.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

Named = Callable[[], Iterable[tuple[str, Tensor]]]
"""Tensors under names that last; the tensors behind them may be replaced by others."""


class Presence(Protocol):
    """Of some tensors on the device."""

    def begin(self) -> None:
        """Start bringing them, behind what the device is doing; until `arrive` nobody may read them."""
        ...

    def arrive(self) -> None:
        """They can be used from here on, by what the current stream is given."""
        ...

    def leave(self, *, changed: bool = False) -> None:
        """Free the device's memory of them. `changed`: they were written to, so their values are taken along."""
        ...


class Kept:
    """A `Presence` of what stays where it is."""

    def begin(self) -> None: ...

    def arrive(self) -> None: ...

    def leave(self, *, changed: bool = False) -> None: ...


class Mover:
    """A `Presence` of tensors that are sent away as soon as it is made.

    Args:
        named: what moves. What has another home, as a counter that an optimizer keeps on the CPU, is left there.
        home: where the tensors are used. On a CPU, which is for rehearsals, host memory is another place in the same
            memory, and what comes is copied at the last moment at which a GPU may do it.
        copies: who copies; None: one of its own.
    """

    def __init__(self, named: Named, home: torch.device, copies: "Copies | None" = None) -> None:
        self.named, self.home = named, home
        self.host: dict[str, Tensor] = {}
        self.is_here = True
        self._copies = copies or Copies(home)
        self._arrival: Callable[[], None] | None = None
        self._send([(name, x) for name, x in named() if x.numel()], all_of_them=True)

    def begin(self) -> None:
        if self.is_here:
            return
        coming = [(x, self.host[name]) for name, x in self.named() if name in self.host]
        places = [torch.empty_like(host, device=self.home) for _, host in coming]  # may fail: nothing has changed yet
        self._arrival = self._copies.bring([(place, host) for place, (_, host) in zip(places, coming, strict=True)])
        for place, (x, _) in zip(places, coming, strict=True):
            x.data = place
        self.is_here = True

    def arrive(self) -> None:
        self.begin()
        if self._arrival is not None:
            self._arrival()
            self._arrival = None

    def leave(self, *, changed: bool = False) -> None:
        if self.is_here:
            self.arrive()  # memory may go to others only when nothing is copied into it any more
            leaving = [(name, x) for name, x in self.named() if x.numel() and x.device.type == self.home.type]
            self._send(leaving, all_of_them=changed)

    @torch.no_grad()
    def _send(self, leaving: list[tuple[str, Tensor]], *, all_of_them: bool) -> None:
        """Each to its place, with its value if it has none yet or if `all_of_them` take theirs."""
        places = {name: self._place(name, x) for name, x in leaving}
        news = [(n, x) for n, x in leaving if all_of_them or places[n] is not self.host.get(n)]
        self._copies.take([(places[name], x.detach()) for name, x in news])
        for name, x in leaving:
            x.data = places[name]
        self.host, self.is_here = places, False

    def _place(self, name: str, x: Tensor) -> Tensor:
        found = self.host.get(name)
        if found is not None and (found.shape, found.dtype) == (x.shape, x.dtype):
            return found
        return torch.empty_like(x.detach(), device="cpu", pin_memory=self.home.type == "cuda")


class Copies:
    """Between host memory and a device; on CUDA on a stream of their own, so beside its work."""

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self.stream = torch.cuda.Stream(home) if home.type == "cuda" else None

    def bring(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copying the second of each to the first; the result makes the current stream wait for all."""
        if self.stream is None:
            return lambda: _copy(pairs)
        done = self._started(pairs)
        return lambda: torch.cuda.current_stream(self.home).wait_event(done)

    def take(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy, and wait until all is there."""
        if self.stream is None:
            _copy(pairs)
        elif pairs:
            self._started(pairs).synchronize()

    def _started(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """The device's memory belongs to the current stream: what that was given before comes first."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(self.home))
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            _copy(pairs)
            done.record()
        return done


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


@contextmanager
def coming(presence: Presence) -> Iterator[None]:
    """Within it the tensors are on their way to the device, or there; afterwards they are not. They are only read."""
    try:
        presence.begin()
        yield
    finally:
        presence.leave()


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once, however many names it has."""
    return [*module.named_parameters(), *module.named_buffers()]
