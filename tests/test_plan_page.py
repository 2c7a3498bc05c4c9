"""docs/memory.md says what the committed plans say."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("plan_shapes")


def test_the_committed_table_is_that_of_the_committed_plans(shapes: Any) -> None:
    text, records = shapes.PAGE.read_text("utf-8"), shapes.read(shapes.RESULTS)
    assert shapes.page(text, records) == text, "run `python bench/plan_shapes.py`"
    cases = {(r["op"], *r["setting"].values()) for r in records}
    assert len(cases) == len(records) == len(shapes.ALL) * len(shapes.CARDS) * 2 * 2


def test_one_command_makes_the_plans_and_the_page(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one shape again: what was known of the others stays, and so does the text around the table."""
    page, results = tmp_path / "page.md", tmp_path / "plans.jsonl"
    page.write_text(f"before\n{shapes.BEGIN}\nold\n{shapes.END}\nafter\n", encoding="utf-8")
    others = [r for r in shapes.read(shapes.RESULTS) if r["op"] != shapes.ALL[0]]
    results.write_text("".join(json.dumps(r) + "\n" for r in others), encoding="utf-8")
    for name, value in {"PAGE": page, "RESULTS": results, "CARDS": ("24GB",), "TOKENS": (1024,)}.items():
        monkeypatch.setattr(shapes, name, value)
    monkeypatch.setattr(shapes, "LADDERS", {"adapters": {"checkpointing": shapes.LORA["checkpointing"]}})
    monkeypatch.setattr("sys.argv", ["plan_shapes.py", shapes.ALL[0]])
    shapes.main()
    made, text = shapes.read(results), page.read_text("utf-8")
    assert made[2:] == others and made[0]["fits"] and made[0]["op"] == shapes.ALL[0]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert made[0]["machine"]["commit"] in text and made[0]["machine"]["versions"]["torch"] in text
    assert capsys.readouterr().out.count(shapes.ALL[0]) == 2
