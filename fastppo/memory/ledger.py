"""Who holds how many bytes: every tensor's memory, followed from its making to its end.

A dispatch mode sees the result of every operation, forward and backward, and a finalizer sees the end of its storage.
What autograd saves for the backward is a storage that lives on, so it counts for as long as it does. On fake tensors,
which have shapes and no memory, this is a dry run; on real ones it is an account of what happened.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Parts = Counter[str]
"""Bytes by label."""


class Ledger(TorchDispatchMode):
    """Bytes that live now, by label, and what they were when their sum was the largest."""

    def __init__(self, label: str = "other") -> None:
        super().__init__()
        self.label = label
        self.live, self.peak = Parts(), Parts()
        self.history: list[list[Parts]] = []  # what lived at each moment of each section that `begin` began
        self._entries: dict[int, tuple[str, int]] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _adds_gradients(args):
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        if [x for x in tree_leaves(out) if isinstance(x, Tensor) and self._add(x)]:
            self.note()
        return out

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Within it, new memory is called so."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def begin(self) -> None:
        """A section of the history: from here on every moment is kept."""
        self.history.append([])
        self.note()

    def tag(self, x: Tensor, label: str) -> None:
        """What `x` holds is called `label` from here on."""
        key = x.untyped_storage()._cdata
        if key in self._entries:
            before, size = self._entries[key]
            self._entries[key] = (label, size)
            self.live[before] -= size
            self.live[label] += size

    def note(self, label: str = "", extra: int = 0) -> None:
        """Keep what lives now, with `extra` bytes of an operation at work, if it is more than ever."""
        higher = self.live.total() + extra > self.peak.total()
        if not (higher or self.history):
            return
        now = Parts({name: size for name, size in self.live.items() if size})
        if extra:
            now[label] += extra
        if higher:
            self.peak = now
        if self.history:
            self.history[-1].append(now)

    def _add(self, x: Tensor) -> bool:
        """Whether it is new memory."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._entries or not size:
            return False
        self._entries[key] = (self.label, size)
        self.live[self.label] += size
        weakref.finalize(storage, self._drop, key).atexit = False
        return True

    def _drop(self, key: int) -> None:
        label, size = self._entries.pop(key)
        self.live[label] -= size


def _adds_gradients(args: Any) -> bool:
    """Whether a backward adds two tensors whose sum has room in the first: there autograd puts it.

    Under a dispatch mode it makes a third. In a dry run nothing is lost by overwriting. A sum that a formula makes for
    itself in a backward is taken for one of autograd's; a forward that is run again there has gradients enabled.
    """
    backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
    if not backward or not all(isinstance(x, FakeTensor) for x in args):
        return False
    first, second = args
    return (first.shape, first.dtype) == (second.shape, second.dtype) and 0 not in first.stride()


@contextmanager
def dry_run() -> Iterator[Ledger]:
    """Within it tensors have a shape, a dtype and no memory; the ledger has what they would take."""
    converts = patch.object(nn.Module, "_apply", _converted)
    with converts, FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        yield ledger


def _converted(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` by new parameters: it would swap what a fake one holds, and that is refused."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, p in self._parameters.items():
        self._parameters[name] = None if p is None else nn.Parameter(fn(p.detach()), p.requires_grad)
    for name, x in self._buffers.items():
        self._buffers[name] = None if x is None else fn(x)
    return self
