"""The four roles: policy, reference, reward, critic. Load, call, save.

The only file that names transformers' model classes. All roles are ordinary transformers models with packed attention
and dropout off, saved so that the AutoModel classes load them: the policy as a causal LM, the critic as a token
classifier with one label (the value of each state).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastppo.attention import PACKED, dense_attention, plan
from fastppo.batch import Prompts
from fastppo.checks import InputError, require
from fastppo.config import ModelConfig
from fastppo.hub import require_there
from fastppo.microbatch import MicroBatch
from fastppo_kernels import linear

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}  # what `attention.py` computes
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)
HEADS = ("score", "classifier")  # names that transformers gives a classification head


class Linear(nn.Linear):
    """nn.Linear by fastppo's product, which is the faster one on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: softcap * tanh((h @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None


def load_policy(config: ModelConfig) -> PreTrainedModel:
    """Any causal LM checkpoint, ready for packed forwards.

    Raises:
        ValueError: the checkpoint is missing, damaged, incomplete, or its logits are not a plain LM head's.
    """
    model = _load(AutoModelForCausalLM, config.path, config.dtype, trust_remote_code=config.trust_remote_code)
    return prepare_policy(model, gradient_checkpointing=config.gradient_checkpointing)


def prepare_policy(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Switch packed attention on and check that hidden states and LM head reproduce the model's own logits."""
    model = _prepare(model, gradient_checkpointing)
    _check_head(model)
    return model


def new_causal_lm(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A causal LM with random weights."""
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def load_reference(config: ModelConfig, policy: PreTrainedModel) -> PreTrainedModel:
    """The frozen model that KL is measured against: the policy as it is now, or the checkpoint the config names."""
    if config.reference is None:
        return reference_of(policy)
    reference = _load(AutoModelForCausalLM, config.reference, config.dtype, trust_remote_code=config.trust_remote_code)
    reference = to_device(prepare_policy(reference), policy.device)
    require(
        lm_head(reference).weight.shape[0] == lm_head(policy).weight.shape[0],
        f"reference and policy must share a vocabulary, got {lm_head(reference).weight.shape[0]} and "
        f"{lm_head(policy).weight.shape[0]} entries",
    )
    return frozen(reference)


def reference_of(policy: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of the policy as it is now."""
    return frozen(copy.deepcopy(policy))


def load_reward_model(path: str, dtype: str = "float32", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Any sequence-classification checkpoint, frozen. Decoders get packed attention, encoders keep their own."""
    model = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code=trust_remote_code)
    return frozen(_prepare(model, False) if is_decoder(model) else _without_dropout(model))


def load_critic(
    path: str, dtype: str = "float32", *, gradient_checkpointing: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A critic saved by fastppo (its value head comes back), or the body of any LM or reward model with a zero head."""
    config = _read_config(path, trust_remote_code)
    cls = _critic_class(config)
    saved = any(name.endswith(cls.__name__.removeprefix("AutoModel")) for name in config.architectures or [])
    model, info = _read(cls, path, trust_remote_code=trust_remote_code, num_labels=1)
    _refuse_damaged(path, model, info, () if saved else HEADS)
    if not saved:
        _zero(value_head(model))
    for parameter in model.base_model.parameters():  # not buffers: rotary frequencies are float32; so is the head
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return _prepare(model, gradient_checkpointing)


def critic_from(
    model: PreTrainedModel, *, label: int | None = None, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """A critic with the body of `model` (a policy, or a reward model with `label` naming the logit to start from).

    The value head is float32: zero for a policy (V = 0 before the first update), the reward head for a reward model.
    """
    critic = _with_body_of(model, _critic_class(model.config))
    head = _zero(value_head(critic).float())
    if label is not None:
        with torch.no_grad():
            source = value_head(model)
            head.weight.copy_(source.weight[label])
            if head.bias is not None and source.bias is not None:
                head.bias.copy_(source.bias[label])
    return _prepare(critic, gradient_checkpointing)


def reward_model_from(model: PreTrainedModel) -> PreTrainedModel:
    """A reward model to be trained: the body of a policy, a new head N(0, 1 / sqrt(H + 1)) (N+ details, reward 2)."""
    reward = _with_body_of(model, AutoModelForSequenceClassification)
    head = value_head(reward).float()
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return _prepare(reward, False)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint."""
    require_there(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = _first_line(error) if has_tokenizer(path) else "it has none of its files"
        ways = "copy tokenizer.json and tokenizer_config.json there, or call tokenizer.save_pretrained on it"
        raise InputError(f"no usable tokenizer at {path!r} ({reason}): {ways}") from error


def has_tokenizer(path: str) -> bool:
    """Whether a checkpoint brings its own tokenizer (a hub name is assumed to)."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES)


def hidden_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Packed forward of the body, without any head: (n, H)."""
    out = model.base_model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, packing=batch.packing
    )
    return out.last_hidden_state[0]


def lm_head(model: PreTrainedModel) -> LMHead:
    """The live LM head (weights are not copied)."""
    head: Any = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return LMHead(head.weight, getattr(head, "bias", None), softcap)


def value_head(model: PreTrainedModel) -> nn.Linear:
    """The classification head of a critic or reward model."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    raise InputError(f"{type(model).__name__} has no linear head named {' or '.join(HEADS)}")


def classify(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The classification head on hidden states (n, H): float32 (n, labels), whatever dtype either has."""
    head = value_head(model)
    return nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def values(critic: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Value of the state after each token, float32 (n,)."""
    return classify(critic, hidden_states(critic, batch)).squeeze(-1)


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether a classifier reads left to right and scores its last token (a `score` head), as LLM reward models do."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model, moved."""
    return model.to(device)  # pyright: ignore[reportArgumentType]  transformers' decorator hides the signature


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model can read; a very large number when its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 62


def require_context(model: PreTrainedModel, prompts: Prompts, limits: Sequence[int]) -> int:
    """The tokens of the longest prompt with `limits`, its most new ones.

    Raises:
        ValueError: it is longer than the model can read.
    """
    pairs = ((len(ids), limit) for ids, limit in zip(prompts.token_ids, limits, strict=True))
    length, limit = max(pairs, key=lambda pair: sum(pair))
    context = context_length(model)
    require(
        length + limit <= context,
        f"a prompt of {length} tokens plus max_new_tokens = {limit} exceeds the model's "
        f"context of {context}: shorten the prompts or lower max_new_tokens",
    )
    return length + limit


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Every end-of-sequence token: of the generation config, the model config and the tokenizer."""
    sources = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    ids: list[int] = []
    for source in sources:
        ids += source if isinstance(source, list) else [] if source is None else [source]
    return tuple(dict.fromkeys(ids))


def save(model: PreTrainedModel, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a folder that the AutoModel classes load: safetensors, config and, when given, the tokenizer."""
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _load(cls: Any, path: str, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    model, info = _read(cls, path, dtype, trust_remote_code=trust_remote_code)
    _refuse_damaged(path, model, info, ())
    return model


def _read(
    cls: Any, path: str, dtype: str = "float32", *, trust_remote_code: bool, **overrides: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers loads what it can and fills the rest with noise; what it filled comes back beside the model."""
    config = _read_config(path, trust_remote_code)
    try:
        for name, value in {**dict.fromkeys(_dropout_keys(config), 0.0), **overrides}.items():
            setattr(config, name, value)
        return cls.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise InputError(f"cannot load {path!r} as {cls.__name__}: {_first_line(error)}") from error


def _read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    require_there(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"cannot read the config of {path!r}: {_first_line(error)}") from error


def _refuse_damaged(path: str, model: PreTrainedModel, info: dict[str, Any], allowed: tuple[str, ...]) -> None:
    wild = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    mismatched = [m[0] if isinstance(m, tuple) else m for m in info["mismatched_keys"]]
    problems = {"lacks": info["missing_keys"], "has the wrong shape for": mismatched, "has NaN or infinity in": wild}
    for problem, names in problems.items():
        bad = sorted(n for n in names if n.split(".")[0] not in allowed)
        require(
            not bad,
            f"checkpoint {path!r} {problem} {len(bad)} tensors, the first is {bad[0] if bad else ''!r}: "
            "it is damaged or of another architecture; give the folder of a whole checkpoint",
        )


def _prepare(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    require(
        model._can_set_attn_implementation(),
        f"{type(model).__name__} does not use transformers' attention interface, so sequences cannot be packed",
    )
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    require(
        not model._is_stateful and not others,
        f"{type(model).__name__} has layers ({', '.join(sorted(others)) or 'with a state'}) other than full and "
        "sliding-window attention: packed sequences would leak into each other there",
    )
    model.set_attn_implementation(PACKED)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # there is no padding: a pad token that is also EOS learns like any other
        if type(module) is nn.Linear and not torch.cuda.is_available():
            module.__class__ = Linear
    _check_packing(_without_dropout(model))
    return model.train()  # checkpointing is only active in train mode; there is no dropout


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The ratio of a policy to itself is 1 only without dropout (N+ details, policy 4)."""
    for name in _dropout_keys(model.config):
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [k for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)]:
            setattr(module, name, 0.0)  # read from the config when the module was made
    return model


def _dropout_keys(config: Any) -> list[str]:
    return [k for k, v in vars(config).items() if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float)]


def _packed(model: PreTrainedModel, *sequences: range) -> MicroBatch:
    """Sequences of token ids, for a forward pass."""
    lengths = [len(ids) for ids in sequences]
    ids = torch.tensor([i for ids in sequences for i in ids], device=model.device)
    position_ids = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    return MicroBatch(ids, position_ids, plan(lengths, model.device), ids, ids, ids, ids)


@torch.no_grad()
def _check_packing(model: PreTrainedModel) -> None:
    """A token whose hidden state hears of the sequence before its own would be trained on noise, without a word."""
    size = model.config.get_text_config().vocab_size
    before, after = range(min(6, size)), range(max(0, size - 6), size)
    together = hidden_states(model, _packed(model, before, after))[len(before) :].float()
    alone = hidden_states(model, _packed(model, after)).float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * (1 + alone.abs().max())
    gap = (together - alone).abs().max()
    require(bool(gap <= tolerance), f"{type(model).__name__} does not keep packed sequences apart (gap {gap:.3g})")


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Some architectures scale logits in ways of their own; to train on other logits than the model's is an error."""
    head = lm_head(model)
    batch = _packed(model, range(min(8, head.weight.shape[0])))
    ids = batch.input_ids
    ours = nn.functional.linear(hidden_states(model, batch), head.weight, head.bias).float()
    ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
    with dense_attention(model):
        theirs = model(input_ids=ids[None], use_cache=False).logits[0].float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * (1 + theirs.abs().max())
    gap = (ours - theirs).abs().max()
    require(
        bool(gap <= tolerance),
        f"{type(model).__name__} turns hidden states into logits in a way fastppo does not know (gap {gap:.3g}): "
        "only a linear head with an optional final_logit_softcapping can be trained",
    )


def _critic_class(config: PreTrainedConfig) -> Any:
    """A value per token is token classification with one label.

    Where transformers has no such class for an architecture, its sequence classifier holds the same body and head.
    """
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    require(
        type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        f"transformers has no classifier for {config.model_type!r}, so it cannot be a critic: name another "
        "checkpoint in critic.init, or use a critic-free ppo.advantage",
    )
    return AutoModelForSequenceClassification


def _with_body_of(model: PreTrainedModel, cls: Any) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    other = cls.from_config(config, dtype=model.dtype).to(model.device)
    getattr(other, other.base_model_prefix).load_state_dict(model.base_model.state_dict())
    return other


@torch.no_grad()
def _zero(head: nn.Linear) -> nn.Linear:
    head.weight.zero_()
    if head.bias is not None:
        head.bias.zero_()
    return head


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
