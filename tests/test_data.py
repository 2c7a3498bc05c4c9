"""Prompts: a record becomes the token ids it says and is used equally often; nothing is cut or left out in silence."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastppo import DataConfig, Prompts, Rollout
from fastppo.data import PromptSource, load_prompts, to_ids
from fastppo.demo import make_tokenizer
from fastppo.rewards import to_samples

TOKENIZER = make_tokenizer()
RECORDS = [{"prompt": f"{i}+{i}=", "answer": i} for i in range(10, 17)]
NOT_A_FUNCTION = 3


def write(path: Path, *records: Any) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


def load(source: str, **settings: Any) -> Prompts:
    return load_prompts(source, DataConfig(prompts=source, **settings), TOKENIZER)


def records() -> Any:
    yield from RECORDS


def texts() -> list[str]:
    return [r["prompt"] for r in RECORDS]


def no_records() -> list[str]:
    return []


def nothing() -> None:
    return None


def test_a_file_and_a_function_of_the_same_records_are_the_same_prompts(tmp_path: Path) -> None:
    from_file = load(write(tmp_path / "p.jsonl", *RECORDS, "", "   "))
    from_function = load("test_data:records")
    assert from_file == from_function and len(from_file) == len(RECORDS)
    assert from_file.token_ids == load("test_data:texts").token_ids
    assert [TOKENIZER.decode(list(ids)) for ids in from_file.token_ids] == [r["prompt"] for r in RECORDS]


def test_records_reach_the_rewards_as_they_are() -> None:
    """With the text and the ids of the sample they belong to."""
    prompts = load("test_data:records")
    rollout = Rollout.pack(prompts.token_ids, [[3, 0]] * len(prompts), records=prompts.records)
    for sample, record, ids in zip(to_samples(rollout, TOKENIZER), RECORDS, prompts.token_ids, strict=True):
        assert sample.record == record and sample.prompt == record["prompt"] and sample.prompt_ids == list(ids)
        assert sample.response == "2" and sample.response_ids == [3, 0]  # special tokens are ids, not text


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in a JSON string as they are."""
    note = "a\u2028b\u0085c"
    (tmp_path / "p.jsonl").write_bytes(f'{{"prompt": "1", "note": "{note}"}}\r\n{{"prompt": "2"}}\r\n'.encode())
    assert [r.get("note") for r in load(str(tmp_path / "p.jsonl")).records] == [note, None]


def test_field_and_template_make_the_prompt(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", {"question": "1+1"}, {"question": [5, 6]})
    prompts = load(source, field="question", template="={prompt}=")
    assert prompts.token_ids == (tuple(TOKENIZER("=1+1=").input_ids), (5, 6))  # ids are taken as they are


def test_text_and_message_go_through_the_chat_template_alike() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "={{ messages[0].content }}{% if add_generation_prompt %}+{% endif %}"
    expected = tuple(tokenizer("=1+1+").input_ids)
    assert to_ids("1+1", DataConfig(prompts="p", chat=True), tokenizer) == expected
    assert to_ids([{"role": "user", "content": "1+1"}], DataConfig(prompts="p"), tokenizer) == expected


def test_long_prompts_are_left_out_only_when_asked_for_and_counted(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "p.jsonl", {"prompt": "1+1="}, {"prompt": "11+11="}, {"prompt": "2+2="})
    with pytest.raises(ValueError, match="prompt 1 of .* has 6 tokens, over data.max_prompt_tokens = 4"):
        load(source, max_prompt_tokens=4)
    assert [r["prompt"] for r in load(source, max_prompt_tokens=4, skip_long=True).records] == ["1+1=", "2+2="]
    assert "left out 1 of 3 prompts over 4 tokens" in capsys.readouterr().out


WRONG: dict[str, tuple[list[Any], str]] = {
    "empty file": ([], "has no records: at least one prompt is needed"),
    "blank lines": (["", " "], "has no records"),
    "not JSON": (['{"prompt": "1"}', "", "{oops"], ":3 is not JSON: Expecting property name"),
    "not an object": (['["1+1="]'], ":1 must be a JSON object, got list"),
    "field missing": ([{"prompt": "1"}, {"text": "1"}], "has no field 'prompt', only ['text']: set data.field"),
    "empty prompt": ([{"prompt": "1"}, {"prompt": ""}], "prompt 1 of"),
    "no ids": ([{"prompt": []}], "it is empty: a policy needs at least one token to continue, e.g. BOS"),
    "null": ([{"prompt": None}], "a prompt is text, token ids or messages, got None"),
    "number": ([{"prompt": 3}], "a prompt is text, token ids or messages, got 3"),
    "id too large": ([{"prompt": [1, 13]}], "token ids must be in [0, 13), the tokenizer's vocabulary, got [13]"),
    "id negative": ([{"prompt": [-100, 2]}], "token ids must be in [0, 13), the tokenizer's vocabulary, got [-100]"),
    "neither ids nor messages": ([{"prompt": ["1+1="]}], "or messages with role and content, got ['1+1=']"),
    "no chat template": ([{"prompt": [{"role": "user", "content": "1"}]}], "the tokenizer has no chat template"),
    "all too long": ([{"prompt": "1" * 2000}], "has 2000 tokens, over data.max_prompt_tokens = 1024: raise it, or set"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_one_sentence_that_names_it(case: str, tmp_path: Path) -> None:
    lines, fragment = WRONG[case]
    source = write(tmp_path / "p.jsonl", *lines)
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        load(source)
    assert source in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("no/such/file.jsonl", "cannot read the prompts at 'no/such/file.jsonl': No such file or directory"),
        (".", "cannot read the prompts at '.': Is a directory"),
        ("no_such_module:records", "cannot import 'no_such_module:records': ModuleNotFoundError"),
        ("test_data:no_such_function", "cannot import 'test_data:no_such_function': AttributeError"),
        ("test_data:NOT_A_FUNCTION", "'test_data:NOT_A_FUNCTION' must be a function, got a int"),
        (".test_data:records", "cannot import '.test_data:records': TypeError"),
        (":records", "a function is named 'module:function', got ':records'"),
        ("test_data:no_records", "'test_data:no_records' has no records"),
        ("test_data:nothing", "'test_data:nothing' must return an iterable of records, got None"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(source: str, fragment: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fragment)):
        load(source)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8 text: invalid start byte at byte 12"):
        load(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_prompt_comes_equally_often(batch_size: int) -> None:
    """CORRECTNESS P25: batches reach into the next pass, so no ragged tail is dropped."""
    source = PromptSource(load("test_data:records"), batch_size, seed=3)
    drawn = [r["answer"] for _ in range(21) for r in next(source).records]
    for passes in range(1, 21 * batch_size // 7 + 1):
        assert set(Counter(drawn[: 7 * passes]).values()) == {passes}
    assert len({tuple(drawn[i : i + 7]) for i in range(0, len(drawn) - 6, 7)}) > 1  # in a new order


def test_ranks_share_out_the_batches_of_one() -> None:
    prompts = load("test_data:records")
    alone = PromptSource(prompts, 4, seed=5)
    ranks = [PromptSource(prompts, 4, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(5):
        parts = [next(source) for source in ranks]
        together = [r["answer"] for part in parts for r in part.records]
        assert sorted(together) == sorted(r["answer"] for r in next(alone).records)
        assert [len(part) for part in parts] == [2, 2]
    with pytest.raises(ValueError, match=r"rollout.num_prompts \(3\) must be a multiple of the ranks \(2\)"):
        PromptSource(prompts, 3, seed=5, world_size=2)
