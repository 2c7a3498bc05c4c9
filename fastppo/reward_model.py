"""The reward that is a sequence classifier."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo import models
from fastppo.batch import Rollout, Sample
from fastppo.checks import require
from fastppo.config import DataConfig, RewardConfig
from fastppo.config_offload import FrozenWay
from fastppo.data import Messages, to_messages
from fastppo.endpoints import RewardError
from fastppo.microbatch import microbatches
from fastppo.offload.mover import Kept, Presence, coming
from fastppo.offload.roles import of_frozen


class RewardModel:
    """A sequence classifier. Reads token ids when it shares the policy's tokenizer, else the text with its own.

    The text of a chat prompt is what the classifier's own chat template makes of it, if it has one. Else it is prompt
    and response as decoded, special tokens left out, and the classifier's own end-of-sequence token where the response
    ended by itself.

    Args:
        model: from `fastppo.models.load_reward_model`.
        tokenizer: the reward model's own; None when it shares the policy's vocabulary.
        label: which logit is the score.
        batch_size: samples per forward.
        max_tokens: of samples packed into one forward; one that is longer goes alone.
        messages_of: the chat messages of a record, or None where its prompt is text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label: int = 0,
        batch_size: int = 64,
        name: str = "reward_model",
        max_tokens: int = 1 << 14,
        messages_of: Callable[[Mapping[str, Any]], Messages | None] = lambda record: None,
    ) -> None:
        require(
            0 <= label < (count := int(model.config.num_labels or 0)),
            f"label must be in [0, {count}), the labels of the reward model, got {label}",
        )
        self.model, self.tokenizer, self.label, self.batch_size, self.name = model, tokenizer, label, batch_size, name
        self.max_tokens, self.messages_of = max_tokens, messages_of
        self.weights_at: Presence = Kept()

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        scores: list[float] = []
        with coming(self.weights_at):  # behind the tokenizer
            for start in range(0, len(samples), self.batch_size):
                ids = [self._ids(s) for s in samples[start : start + self.batch_size]]
                self.weights_at.arrive()
                scores += self._score(ids)
        return scores

    def _ids(self, sample: Sample) -> list[int]:
        if self.tokenizer is None:
            return [*sample.prompt_ids, *sample.response_ids]
        messages = self.messages_of(sample.record)
        if messages is not None and self.tokenizer.chat_template is not None:
            whole = [*messages, {"role": "assistant", "content": sample.response}]
            cut = sample.finish_reason == "length"
            text: Any = self.tokenizer.apply_chat_template(whole, tokenize=False, continue_final_message=cut)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        ids: list[Any] = list(self.tokenizer(sample.prompt + sample.response).input_ids)
        eos: Any = self.tokenizer.eos_token_id  # the end of the answer is part of what is judged
        return [*ids, eos] if sample.finish_reason == "stop" and eos is not None and ids[-1:] != [eos] else ids

    def _score(self, ids: list[list[int]]) -> list[float]:
        context, longest = models.context_length(self.model), max(len(row) for row in ids)
        if longest > context:
            raise RewardError(f"reward {self.name!r} reads {context} tokens, but a sample has {longest} of its tokens")
        if models.is_decoder(self.model):
            rollout = Rollout.pack(ids, [[] for _ in ids], device=self.model.device)
            return [
                float(x)
                for batch in microbatches(rollout, max(longest, self.max_tokens))
                for x in self._last_token_scores(batch)
            ]
        width = max(len(row) for row in ids)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self.model.device)
        return self.model(input_ids=padded, attention_mask=mask).logits[:, self.label].float().tolist()

    def _last_token_scores(self, batch: Any) -> list[float]:
        last = batch.packing.cu_seqlens[1:].long() - 1
        hidden = models.hidden_states(self.model, batch)[last]
        return models.classify(self.model, hidden)[:, self.label].tolist()


def reward_model_of(
    config: RewardConfig,
    policy_tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    data: DataConfig | None,
    base: PreTrainedModel | None,
    offload: FrozenWay,
) -> RewardModel:
    """What a run file's [[rewards]] table of kind "model" describes; the arguments are those of `load_rewards`."""
    model = models.load_reward_model(config.target, config.dtype, trust_remote_code=config.trust_remote_code, base=base)
    model = models.to_device(model, device) if offload == "keep" else model
    tokenizer = _own_tokenizer(config.target, config.trust_remote_code, policy_tokenizer, model)
    made = RewardModel(
        model, tokenizer=tokenizer, label=config.label, batch_size=config.batch_size, name=config.log_name
    )
    made.weights_at = of_frozen(model, offload, device, beside=base)
    if data is not None:
        made.messages_of = lambda record: to_messages(record[data.field], data)
    return made


def _own_tokenizer(
    path: str, trust_remote_code: bool, policy_tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> PreTrainedTokenizerBase | None:
    """None when ids mean the same to policy and reward model, else the reward model's tokenizer."""
    own = models.load_tokenizer(path, trust_remote_code=trust_remote_code) if models.has_tokenizer(path) else None
    same = own is None or (policy_tokenizer is not None and own.get_vocab() == policy_tokenizer.get_vocab())
    if not same:
        require(policy_tokenizer is not None, f"reward model {path!r} reads text, so the policy needs a tokenizer")
        return own
    size, vocab_size = len(policy_tokenizer or ()), model.config.get_text_config().vocab_size
    require(
        size <= vocab_size,
        f"reward model {path!r} has no tokenizer of its own and a vocabulary of {vocab_size}, smaller "
        f"than the policy's {size}: put its tokenizer into its folder",
    )
    return None
