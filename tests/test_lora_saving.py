"""Adapters are merged into the weights they change in host memory, wherever base and adapters are."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo import models, saving
from fastppo.models.files import _around
from test_lora import adapted

pytest.importorskip("peft", reason="pip install 'fastppo[lora]'")
GPU = torch.device("cuda", 0)


class MadeOnTheGPU(TorchDispatchMode):
    """Storages there that an operation made, by its name."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device == GPU]
        self.found += [func.name() for x in tensors if x.untyped_storage()._cdata not in self.known]
        return out


@pytest.mark.parametrize("aside", [False, True], ids=["as it is", "as an asynchronous checkpoint has it"])
def test_merging_is_on_the_host_and_makes_nothing_where_the_base_is(aside: bool) -> None:
    """A base on a GPU, played by tensors that know their device and have no memory; adapters beside it, or copied to
    host memory as a checkpoint that is written beside training has them: the two cannot be added where they are."""
    policy = adapted(moved=True)
    expected = models.plain_weights(policy)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    model = _around(policy, saving._in_host_memory(trained, {})) if aside else policy
    mode, own = FakeTensorMode(allow_non_fake_inputs=True), {id(p) for p in policy.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) in own:
                there = FakeTensor(mode, torch.empty(p.shape, dtype=p.dtype, device="meta"), GPU)
                setattr(module, name, nn.Parameter(there, requires_grad=p.requires_grad))
    devices = {p.device.type for p in model.parameters()}
    assert devices == ({"cuda", "cpu"} if aside else {"cuda"})
    known = {x.untyped_storage()._cdata for x in model.parameters()}
    with mode, MadeOnTheGPU(known) as made:
        merged = models.plain_weights(model)
    assert made.found == []
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in expected.items()}
    assert {name for name, x in merged.items() if x.device.type == "cpu"} == {n for n in merged if "proj" in n}
