"""The dependency direction of the packages, read from their source and without importing them.

An import counts wherever it stands: at the top, inside a function, under TYPE_CHECKING, relative, or spelled
`importlib.import_module("...")`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastppo": ROOT / "fastppo", "fastppo_kernels": ROOT / "kernels" / "fastppo_kernels"}

PHASES = {f"fastppo.{name}" for name in ("rollout", "rewards", "score", "advantages", "update")}
SAME = {"fastppo.reward_model": "fastppo.rewards"}  # one phase in two files
ABOVE_THE_PHASES = {"fastppo.engine", "fastppo.trainer", "fastppo.cli", "fastppo.__main__", "fastppo.<public names>"}
KINDS = ("", "_inputs", "_layers", "_memory", "_offload", "_optimizer", "_ppo", "_vllm", "_watch")
CONFIGS = {f"fastppo.config{name}" for name in KINDS}
SHARED = {"fastppo.batch", "fastppo.protocols"} | CONFIGS
STDLIB_ONLY = {"fastppo.checks"} | CONFIGS
VLLM_SIDE = "fastppo.rollout.server.fastppo_worker"
MODEL_CLASSES = re.compile(r"transformers\.(.*\.)?(AutoModel\w*|\w+For(CausalLM|(Sequence|Token)Classification))")

Import = tuple[str, int]  # (absolute dotted name, line)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every name that `source`, the text of `module`, imports; `from a import b` gives `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers":
            yield f"transformers.{node.attr}", node.lineno


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source` imports against the rules, one sentence each; empty when it keeps them."""
    found = []
    for name, line in imports(source, module, is_package):
        reason = _broken_rule(module, _owner(name), name)
        if reason:
            found.append(f"{module}, line {line}: imports {name}, but {reason}")
    return found


def _owner(name: str) -> str:
    """The module of fastppo that `name` lives in, two levels deep; any other name as it is."""
    if name.split(".")[0] != "fastppo":
        return name
    owner = ".".join(name.split(".")[:2])
    known = PHASES | ABOVE_THE_PHASES | SHARED
    path = PACKAGES["fastppo"] / owner.rpartition(".")[2]
    owner = SAME.get(owner, owner)
    return owner if owner in known or path.is_dir() or path.with_suffix(".py").is_file() else "fastppo.<public names>"


def _broken_rule(module: str, owner: str, name: str) -> str | None:
    root = name.split(".")[0]
    if module.split(".")[0] == "fastppo_kernels":
        allowed = sys.stdlib_module_names | {"torch", "triton", "fastppo_kernels"}
        return None if root in allowed else "fastppo_kernels depends on torch and triton only"

    importer = ".".join(module.split(".")[:2])
    importer = SAME.get(importer, importer)
    if root == "triton":
        return "Triton stays in fastppo_kernels"
    if root == "vllm" and module != VLLM_SIDE:
        return "vLLM lives in an environment and a process of its own"
    if module == VLLM_SIDE and root == "fastppo":
        return "there is no fastppo where vLLM runs"
    if root == "tyro" and importer != "fastppo.cli":
        return "only fastppo/cli.py imports tyro"
    if MODEL_CLASSES.fullmatch(name) and importer not in {"fastppo.models", "fastppo.bench"}:
        return "only fastppo/models imports transformers' model classes"
    if owner == "fastppo.bench" and importer not in {"fastppo.bench", "fastppo.cli"}:
        return "only the command line knows the benchmark"
    if importer in STDLIB_ONLY and root not in sys.stdlib_module_names and owner not in STDLIB_ONLY:
        return "the config modules and the checks.py they use import the standard library only"
    if importer in SHARED and owner in PHASES | ABOVE_THE_PHASES:
        return "what every phase imports may not import a phase or anything above one"
    if importer in PHASES and owner in (PHASES | ABOVE_THE_PHASES) - {importer}:
        return "phases import neither each other nor what calls them"
    if importer == "fastppo.engine" and owner in {"fastppo.trainer", "fastppo.cli"}:
        return "the engine is below the trainer and the command line"
    if importer == "fastppo.trainer" and owner == "fastppo.cli":
        return "the trainer is below the command line"
    return None


def source_files() -> list[tuple[str, Path]]:
    """(module name, file) of every Python file of both packages."""
    files = []
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            files.append((".".join([package, *(part for part in parts if part != "__init__")]), file))
    return files


@pytest.mark.parametrize(("module", "file"), source_files(), ids=[module for module, _ in source_files()])
def test_module_keeps_the_import_rules(module: str, file: Path):
    found = violations(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastppo_kernels.gae", "import transformers"),
        ("fastppo_kernels.gae", "from fastppo.config import PPOConfig"),
        ("fastppo_kernels.gae", "def f():\n    import accelerate"),
        ("fastppo_kernels.gae", "import importlib\nimportlib.import_module('fastppo.batch')"),
        ("fastppo.reward_model", "from fastppo.score import action_logprobs"),
        ("fastppo.score", "import fastppo.reward_model"),
        ("fastppo.config", "import torch"),
        ("fastppo.config_inputs", "import torch"),
        ("fastppo.checks", "import torch"),
        ("fastppo.config", "from fastppo.batch import Rollout"),
        ("fastppo.config", "from .batch import Rollout"),
        ("fastppo.batch", "from fastppo import score"),
        ("fastppo.protocols", "if TYPE_CHECKING:\n    from fastppo.rollout.embedded import EmbeddedRollout"),
        ("fastppo.score", "from fastppo.update import update"),
        ("fastppo.score", "from . import update"),
        ("fastppo.update", "from fastppo.engine import PPOEngine"),
        ("fastppo.update", "from fastppo import PPOEngine"),
        ("fastppo.rollout.embedded", "from ..score import score"),
        ("fastppo.rollout.embedded", "import fastppo.trainer"),
        ("fastppo.update", "import triton.language as tl"),
        ("fastppo.engine", "from fastppo.trainer import train"),
        ("fastppo.trainer", "import tyro"),
        ("fastppo.rollout.vllm", "from vllm import LLM"),
        ("fastppo.rollout.server.fastppo_worker", "from fastppo.batch import Rollout"),
        ("fastppo.rewards", "from transformers import AutoModelForSequenceClassification"),
        ("fastppo.rewards", "import transformers\nmodel = transformers.AutoModel.from_pretrained(path)"),
        ("fastppo.engine", "from fastppo.bench.machine import machine"),
        ("fastppo.score", "from transformers.models.llama.modeling_llama import LlamaForCausalLM"),
    ],
)
def test_planted_violation_is_found(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastppo_kernels.gae", "import math\nimport torch\nimport triton.language as tl"),
        ("fastppo.config", "import math\nfrom fastppo.checks import require"),
        ("fastppo.models.roles", "from transformers import AutoModelForCausalLM"),
        ("fastppo.cli", "import tyro\nfrom fastppo.trainer import train"),
        ("fastppo.bench.step", "from fastppo import PPOEngine\nfrom fastppo.bench import records"),
        ("fastppo.bench.ppo_iteration.ppo_setting", "from transformers import Qwen2ForCausalLM"),
        ("fastppo.rewards", "from transformers import AutoTokenizer\nfrom fastppo.batch import Rollout"),
        ("fastppo.rollout.embedded", "from fastppo.rollout import sampling\nfrom fastppo_kernels import sample"),
        ("fastppo.engine", "from fastppo.score import score\nfrom fastppo.update import update"),
        ("fastppo.rollout.server.fastppo_worker", "import vllm\nimport safetensors\nimport torch"),
    ],
)
def test_permitted_import_is_not_reported(module: str, source: str):
    assert violations(source, module) == []
