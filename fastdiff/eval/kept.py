"""A finished row in a file, so that a run that is killed keeps it and the next one does not measure it again.

The file holds a ``key`` of everything that decides the row: the images, what drew them and on which device, the prompts, and the
protocol with its instruments. It is read only where the key of now is equal; else the row is measured and the file written anew.

>>> write_row("runs/images/student.row.json", key, result, protocol)
>>> read_row("runs/images/student.row.json", key, images=shown, prompts=prompts)        # (result, protocol), or None
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff._version import __version__
from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Result
from fastdiff.eval.frechet import FD
from fastdiff.eval.protocol import Protocol
from fastdiff.files import aside

FORMAT = "fastdiff-row-1"
_ELSEWHERE = ("images", "prompts", "features")  # the first two are given again; nothing of a row needs the features


def write_row(path: str | Path, key: Mapping[str, Any], result: Result, protocol: Protocol) -> None:
    """Write ``result`` without its images and features."""
    values = {f.name: getattr(result, f.name) for f in fields(Result) if f.name not in _ELSEWHERE}
    values["groups"] = {name: asdict(distance) for name, distance in result.groups.items()}
    found = {"format": FORMAT, "fastdiff": __version__, "key": key, "result": values, "protocol": protocol.record}
    with aside(path) as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_row(path: str | Path, key: Mapping[str, Any], *, images: Tensor, prompts: list[str]) -> tuple[Result, Protocol] | None:
    """The row of ``path`` with its protocol; None where there is none, or one of another key, version or format.

    ``UserError`` for a file that is no JSON: it was damaged after it was written, which is done aside.
    """
    file = Path(path)
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} holds no finished row: {error}. Delete it, and the row is measured again.") from error
    now = {"format": FORMAT, "fastdiff": __version__, "key": json.loads(json.dumps(key))}
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in now.items()):
        return None
    values = dict(found["result"])
    values["groups"] = {name: FD(**distance) for name, distance in values["groups"].items()}
    values["warnings"] = tuple(values["warnings"])
    return Result(**values, images=images, prompts=prompts), Protocol.of_record(found["protocol"])
