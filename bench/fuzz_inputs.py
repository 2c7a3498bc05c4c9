"""Mutated run files and damaged checkpoints: each gives one clear sentence or the older whole one, never a traceback.

    python bench/fuzz_inputs.py --configs 1000 --checkpoints 300

A mutated run file must be put together as a legal run or be refused by an InputError in one line, or with the planner's
table where it cannot fit the memory. A damaged folder of checkpoints must give the newest one that is bit for bit as it
was written, or none, with a reason for each that was passed over. Exit code 1 if one does otherwise. Everything happens
in this process.
"""

import argparse
import io
import json
import math
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import runs  # noqa: E402
from fastppo import checkpoint, load_config, train  # noqa: E402
from fastppo.checks import InputError  # noqa: E402
from fastppo.resume import find  # noqa: E402
from fastppo.run import build  # noqa: E402
from fastppo.run_file import to_dict  # noqa: E402

VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2**63, -(2**70), 0.0, -0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan, True, False),
    *("", "none", "x", "../..", "a:b", "http://", "http://[", "http://a:b@c/?d=e", "\x00", "é" * 50, "{prompt}"),
    *([], [1], ["x"], [[]], [[1, 2]], {}, {"x": 1}, [{}], [{"kind": "http", "target": "http://a"}]),
)


def mutated_tables(tables: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One or two of all keys get another value, mostly of their own type, or another name, or go."""
    out = json.loads(json.dumps(tables))
    for _ in range(rng.randint(1, 2)):
        table, key = rng.choice(list(_keys(out)))
        action = rng.random()
        if action < 0.75:
            table[key] = rng.choice([x for x in VALUES if type(x) is type(table[key])] or VALUES)
        elif action < 0.85:
            table[key] = rng.choice(VALUES)
        elif action < 0.9:
            del table[key]
        else:
            table[rng.choice(("", "unknown", key + "_", key[:-1]))] = table.pop(key) if action < 0.95 else 1
    return out


def _keys(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in table.items():
        yield table, key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _keys(inner)


def mutated_text(text: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or the file cut short."""
    content = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        a = rng.randrange(len(content) or 1)
        b = min(len(content), a + rng.randint(1, 40))
        action = rng.randrange(4)
        if action == 0 and content:
            content[a] = rng.randrange(256)
        elif action == 1:
            del content[a:b]
        elif action == 2:
            content[a:a] = content[a:b]
        else:
            del content[a:]
    return bytes(content)


def fuzz_configs(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """`count` mutated run files; what became of them."""
    tables = _without_none(to_dict(runs.config(folder, watch={"window": 3})))  # every key
    base, outcomes = runs.toml(tables), Counter[str]()
    (folder / "fuzz.toml").write_text(base, encoding="utf-8")
    load_config(folder / "fuzz.toml")  # what is mutated is legal, else every mutation of it is refused
    for i in range(count):
        kind = ("values", "bytes", "JSON")[i % 3]
        path = folder / ("fuzz.json" if kind == "JSON" else "fuzz.toml")
        if kind == "values":
            path.write_text(_toml(mutated_tables(tables, rng)), encoding="utf-8", errors="surrogatepass")
        elif kind == "JSON":
            path.write_text(json.dumps(mutated_tables(tables, rng)), encoding="utf-8")
        else:
            path.write_bytes(mutated_text(base.encode(), rng))
        outcomes[f"{kind}: {outcome(lambda path=path: load_config(path), path)}"] += 1
    return outcomes


def outcome(call: Callable[[], Any], path: Path) -> str:
    try:
        config = call()
        numbers = _numbers(to_dict(replace(config, ppo=replace(config.ppo, clip_high=0.0))))  # infinity: no clip
        if not all(map(math.isfinite, numbers)):
            raise AssertionError("it took a number that is not finite")
        with redirect_stdout(io.StringIO()):
            build(replace(config, out=str(path.parent / "run"))).close()
    except InputError as error:
        if str(error).startswith("memory: "):
            return "refused with the table of what it would take"
        return "refused in one line" if str(error).strip() and "\n" not in str(error) else failure(path)
    except BaseException:
        return failure(path)
    return "a legal run, put together"


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [x for v in (value.values() if isinstance(value, dict) else value) for x in _numbers(v)]
    return [value] if isinstance(value, int | float) else []


def failure(path: Path) -> str:
    print(f"--- {path.name}:\n{path.read_bytes()!r:.2000}\n{traceback.format_exc()}", file=sys.stderr)
    return "WRONG"


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(x) for x in value] if isinstance(value, list | tuple) else value


def _toml(tables: dict[str, Any]) -> str:
    """As runs.toml, for values it does not know."""
    try:
        text = runs.toml(tables)
        return text.replace("Infinity", "inf").replace("NaN", "nan").replace("null", '"none"')
    except (TypeError, AttributeError, IndexError):
        return json.dumps(tables)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """With the same file of the other checkpoint."""
    others = [p for p in path.parents[1 if path.parent.name.startswith("step") else 2].glob("step-*")]
    inside = path.relative_to(next(p for p in path.parents if p.name.startswith("step")))
    other = next(p for p in others if p not in path.parents) / inside
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(7))


NAMES = ("step-000004", "step-000002")  # the newest first
DAMAGE = (truncate, flip, missing, swap, append)


def fuzz_checkpoints(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """`count` damaged copies of two checkpoints; what `--resume` would go on from."""
    config = runs.config(folder, train={"total_steps": 4, "eval_every": 9, "save_every": 2, "keep_last": 0})
    with redirect_stdout(io.StringIO()):
        train(config)
    whole = folder / "run" / "checkpoints"
    shutil.rmtree(whole / "final")
    outcomes = Counter[str]()
    contents = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for i in range(count):
        shutil.rmtree(whole)
        for path, content in contents.items():
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            (whole / path).write_bytes(content)
        damage = DAMAGE[i % len(DAMAGE)]
        targets = sorted((whole / ("step-000004" if rng.random() < 0.8 else "step-000002")).rglob("*.*"))
        damage(rng.choice(targets), rng)
        outcomes[f"{damage.__name__}: {_resumes(config, whole, contents)}"] += 1
    return outcomes


def _resumes(config: Any, whole: Path, contents: dict[Path, bytes]) -> str:
    """Whether what would be resumed is, byte for byte, what was written."""
    try:
        found, passed_over = checkpoint.newest(whole)
        with redirect_stdout(io.StringIO()):
            find(config, "latest")
        same = {path: (whole / path).exists() and (whole / path).read_bytes() == c for path, c in contents.items()}
        intact = {name: all(ok for path, ok in same.items() if name in path.parts) for name in NAMES}
        extra = any(path.relative_to(whole) not in contents for path in whole.rglob("*") if path.is_file())
        expected = next((name for name in NAMES if intact[name]), None)
        if (found.path.name if found else None) != expected or extra or any("\n" in why for why in passed_over):
            raise AssertionError(f"went on from {found}, whole is {expected}; {passed_over}")
    except BaseException:
        print(traceback.format_exc(), file=sys.stderr)
        return "WRONG"
    return {None: "none is whole, and it says so", NAMES[0]: "the newest", NAMES[1]: "the older one"}[expected]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz_configs(Path(folder), args.configs, rng)
    with tempfile.TemporaryDirectory() as folder:
        outcomes += fuzz_checkpoints(Path(folder), args.checkpoints, rng)
    for what, number in sorted(outcomes.items()):
        print(f"{number:5}  {what}")
    raise SystemExit(any("WRONG" in what for what in outcomes))


if __name__ == "__main__":
    main()
