"""The README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[str]:
    return re.findall(r"<!-- tests/test_readme.py runs this -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_embedding_example_runs(capsys):
    code, _ = examples()
    assert code.count("\n") <= 22
    exec(compile(code, str(README), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert all(float(x) == float(x) for line in lines for x in line.split())


def test_the_kernel_example_is_the_surrogate_at_ratio_one(capsys):
    _, code = examples()
    names = {}
    exec(compile(code, str(README), "exec"), names)
    loss, clipped = map(float, capsys.readouterr().out.split())
    assert abs(loss + float(names["advantages"].mean())) < 1e-6 and clipped == 0
