"""Loaded by a vLLM server, never by fastppo: takes over weights that the trainer left in a folder as safetensors.

It stands in a folder of its own, which the server gets as PYTHONPATH: a folder with `vllm.py` in it would hide vLLM
itself. `vllm_command.py` has the rest of the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "fastppo"


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where the weights are: a folder with *.safetensors, named as in a Hugging Face checkpoint."""

    folder: str


class FolderTransfer(WeightTransferEngine[Init, Update]):
    """Every worker maps the files and keeps its own share of each tensor."""

    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info: Init) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        files = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"no *.safetensors in {update_info.folder}: do trainer and server share this folder?"
            )
        expected = {name for name, _ in self.model.named_parameters()}
        if getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            expected = {name for name in expected if not name.endswith("lm_head.weight")}
        loaded = self.model.load_weights(_tensors(files))
        if self.model_config.quantization is None and loaded is not None and (left := expected - loaded):
            raise ValueError(f"{len(left)} parameters got no weights, the first is {min(left)}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":  # a head tied to the embeddings keeps its old packed copy: pack it again
            for head in (m for m in self.model.modules() if isinstance(m, ParallelLMHead)):
                dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None: ...


class Extension:
    """Mixed into vLLM's worker, so that the worker imports this file."""


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                yield name, tensors.get_tensor(name)


if BACKEND not in WeightTransferEngineFactory._registry:  # imported by the server and by each of its workers
    WeightTransferEngineFactory.register_engine(BACKEND, FolderTransfer)
