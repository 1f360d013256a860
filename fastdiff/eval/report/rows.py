"""Rows of results in files: one JSON object with facts beside them, or JSON lines, one a model, for programs to read.

>>> rows_json("run/result.json", results, protocol="fashion#3fa91c2e")
>>> read_rows("run/result.json") == [r.row() for r in results]
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Result
from fastdiff.eval.report.columns import Row
from fastdiff.files import aside


def rows_of(results: Sequence[Result | Row]) -> list[dict[str, Any]]:
    """Results and rows as rows."""
    return [r.row() if isinstance(r, Result) else dict(r) for r in results]


def rows_json(path: str | Path, results: Sequence[Result | Row], **facts: Any) -> None:
    """Write ``{"rows": [...], **facts}``; a number that is not finite is an error, as JSON has none."""
    with aside(path) as part:
        part.write_text(json.dumps({"rows": rows_of(results), **facts}, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def rows_jsonl(path: str | Path, results: Sequence[Result | Row], *, protocol: str = "") -> None:
    """Write one line of JSON a row; numbers that are not finite are an error.

    Args:
        protocol: such as ``fashion#3fa91c2e``, in each line; ``changes`` refuses to compare lines of different ones.
    """
    more = {"protocol": protocol} if protocol else {}
    with aside(path) as part:
        part.write_text("".join(json.dumps({**r, **more}, allow_nan=False) + "\n" for r in rows_of(results)), encoding="utf-8")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of ``rows_json`` or ``rows_jsonl``; ``UserError`` for anything else, and for a file without rows."""
    found, lines = _read(Path(path))
    rows = lines if found is None else found["rows"]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no rows of results: the run that wrote it measured nothing. Evaluate it first.")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("model"), str):
            raise UserError(f"row {i + 1} of {path} has no model's name: {_foreign(row)}")
        for key, value in row.items():
            if not (_groups(value) if key == "groups" else isinstance(value, int | float | str | None)):
                raise UserError(f"{key!r} in row {i + 1} of {path} is no number and no text: {_foreign(value)}")
    return rows


def read_facts(path: str | Path) -> dict[str, Any]:
    """What ``rows_json`` wrote beside the rows; of JSON lines there is nothing."""
    found, _ = _read(Path(path))
    return {} if found is None else {k: v for k, v in found.items() if k != "rows"}


def joined_facts(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several files as those of one: ``name`` where all files agree, else ``name, <file>`` for each file that has it.

    >>> joined_facts({"a.json": {"seed": 0, "score": "FD"}, "b.json": {"seed": 1, "score": "FD"}})
    {'seed, a.json': 0, 'seed, b.json': 1, 'score': 'FD'}
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for facts in files.values() for name in facts):
        there = {file: facts[name] for file, facts in files.items() if name in facts}
        first = next(iter(there.values()))
        if len(there) == len(files) and all(value == first for value in there.values()):
            found[name] = first
        else:
            found |= {f"{name}, {file}": value for file, value in there.items()}
    return found


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Any]]:
    """The object of ``rows_json``, or the lines of ``rows_jsonl``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the rows of {path}: {error}. Give the JSON file that an evaluation wrote.") from error
    try:
        whole = json.loads(text, parse_constant=_no_number)
    except ValueError:
        return None, [_line(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(whole, dict):
        return (whole, []) if "rows" in whole else (None, [whole])
    raise UserError(f"{path} holds a JSON {type(whole).__name__}, not rows of results: {_foreign(whole)}")


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line, parse_constant=_no_number)
    except ValueError as error:
        raise UserError(f"line {number} of {path} is no JSON ({error}): give a file that an evaluation wrote.") from error


def _groups(value: Any) -> bool:
    """Whether it is ``{class: [value, error]}``."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(v, list) and len(v) == 2 and all(isinstance(x, int | float) for x in v) for v in value.values())


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _foreign(found: Any) -> str:
    return f"found {str(found)[:60]!r}. Give a JSON file that an evaluation wrote."
