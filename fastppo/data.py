"""Prompt sources: records from a JSONL file or a function -> token ids. Nothing is cut or dropped in silence."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo import distributed
from fastppo.batch import Prompts
from fastppo.checks import InputError, require
from fastppo.config import DataConfig
from fastppo.endpoints import import_function

Record = Mapping[str, Any]
Messages = list[Mapping[str, str]]


def load_prompts(source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read every record of `source` and turn its prompt into token ids.

    Args:
        source: path of a JSONL file, or "module:function" returning an iterable of records (dicts, or plain text).

    Raises:
        ValueError: no records, a line that is not a JSON object, a record without the field, a prompt that is empty,
            over the limit, or not text, token ids or messages.
    """
    records = _read(source)
    require(len(records) > 0, f"{source!r} has no records: at least one prompt is needed")
    ids, kept, skipped = [], [], 0
    for i, record in enumerate(records):
        require(
            config.field in record,
            f"record {i} of {source!r} has no field {config.field!r}, only {sorted(record)}: set data.field",
        )
        try:
            tokens = to_ids(record[config.field], config, tokenizer)
            require(len(tokens) > 0, "it is empty: a policy needs at least one token to continue, e.g. BOS")
        except ValueError as error:
            raise InputError(f"prompt {i} of {source!r}: {error}") from error
        if len(tokens) > config.max_prompt_tokens:
            require(
                config.skip_long,
                f"prompt {i} of {source!r} has {len(tokens)} tokens, over data.max_prompt_tokens = "
                f"{config.max_prompt_tokens}: raise it, or set data.skip_long to leave such prompts out",
            )
            skipped += 1
            continue
        ids.append(tokens)
        kept.append(record)
    require(len(ids) > 0, f"all {skipped} prompts of {source!r} are over data.max_prompt_tokens; raise it")
    if skipped and distributed.rank() == 0:
        print(f"data: left out {skipped} of {len(records)} prompts over {config.max_prompt_tokens} tokens")
    return Prompts(token_ids=tuple(ids), records=tuple(kept))


def to_ids(prompt: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of one prompt: ids are taken as they are, messages go through the chat template, text is encoded."""
    if isinstance(prompt, str) and not config.chat:
        return tuple(tokenizer(config.template.replace("{prompt}", prompt)).input_ids)
    prompt = to_messages(prompt, config) or prompt
    require(isinstance(prompt, list | tuple), f"a prompt is text, token ids or messages, got {prompt!r}")
    if all(isinstance(x, int) and not isinstance(x, bool) for x in prompt):
        bad = [x for x in prompt if not 0 <= x < len(tokenizer)]
        require(not bad, f"token ids must be in [0, {len(tokenizer)}), the tokenizer's vocabulary, got {bad[:3]}")
        return tuple(prompt)
    require(
        to_messages(prompt, config) is not None,
        f"a prompt is text, token ids or messages with role and content, got {prompt!r:.200}",
    )
    require(tokenizer.chat_template is not None, "the tokenizer has no chat template: give text or token ids")
    rendered = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    assert isinstance(rendered, str)
    return tuple(tokenizer(rendered, add_special_tokens=False).input_ids)  # the template wrote the special tokens


def to_messages(prompt: Any, config: DataConfig) -> Messages | None:
    """The chat messages of a prompt: those it is made of, or with `data.chat` its text as the user's; else None."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": config.template.replace("{prompt}", prompt)}] if config.chat else None
    several = isinstance(prompt, list | tuple) and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    return list(prompt) if several else None


class PromptSource:
    """Batches of prompts without end: a fresh permutation per pass, every prompt once in it.

    Args:
        prompts: all of them.
        batch_size: prompts per batch; of these this rank gets every `world_size`-th.
        seed: of the permutations; the same on every rank.
    """

    def __init__(self, prompts: Prompts, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        even = batch_size % world_size == 0
        require(even, f"rollout.num_prompts ({batch_size}) must be a multiple of the ranks ({world_size})")
        self.prompts, self.batch_size, self.rank, self.world_size = prompts, batch_size, rank, world_size
        self.seed, self.position = seed, 0  # prompts handed out so far, over all ranks: the whole state
        self._pass: tuple[int, list[int]] = -1, []  # its number and its permutation

    def __next__(self) -> Prompts:
        places = range(self.position + self.rank, self.position + self.batch_size, self.world_size)
        self.position += self.batch_size
        return select(self.prompts, [self._at(place) for place in places])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids and records: whether a resumed run still has the same prompts and answers."""
        digest = hashlib.sha256()
        for ids, record in zip(self.prompts.token_ids, self.prompts.records, strict=True):
            digest.update(json.dumps([ids, record], sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    def _at(self, place: int) -> int:
        """Index of the prompt at `place` of the endless sequence; a batch may reach into the next pass."""
        number, place = divmod(place, len(self.prompts))
        if number != self._pass[0]:
            generator = torch.Generator().manual_seed(self.seed + 1000003 * number)
            self._pass = number, torch.randperm(len(self.prompts), generator=generator).tolist()
        return self._pass[1][place]


def select(prompts: Prompts, index: Iterable[int]) -> Prompts:
    """The prompts at `index`, in its order."""
    index = list(index)
    return Prompts(
        token_ids=tuple(prompts.token_ids[i] for i in index),
        records=tuple(prompts.records[i] for i in index),
        limits=tuple(prompts.limits[i] for i in index) if prompts.limits else (),
    )


def _read(source: str) -> list[Record]:
    if ":" in source and not Path(source).exists():
        found = import_function(source)()
        require(isinstance(found, Iterable), f"{source!r} must return an iterable of records, got {found!r}")
        return [r if isinstance(r, Mapping) else {"prompt": r} for r in found]
    try:
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 in a string
    except OSError as error:
        raise InputError(f"cannot read the prompts at {source!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:  # a zero byte in the name
        raise InputError(f"cannot read the prompts at {source!r}: {error}") from error
    return [_record(source, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(source: str, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}:{number} is not JSON: {error.msg}") from error
    require(isinstance(record, dict), f"{source}:{number} must be a JSON object, got {type(record).__name__}")
    return record
