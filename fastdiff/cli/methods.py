"""``fastdiff methods``: every distillation method, read from the source of ``fastdiff/trainers`` without running it.

A method is a class that descends from ``Method`` and says where it comes from in ``info = Paper(...)``. It is
called like its file, with hyphens. Reading the syntax tree instead of importing keeps torch out.
"""

import ast
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.cli.options import nearest, parse
from fastdiff.errors import UserError

TRAINERS = Path(__file__).parent.parent / "trainers"


@dataclass(frozen=True)
class Entry:
    """What the source says about one method."""

    name: str
    summary: str
    module: str
    cls: str
    paper: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The class itself; imports torch."""
        return getattr(importlib.import_module(self.module), self.cls)


def _paper(node: ast.ClassDef) -> dict[str, Any] | None:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(isinstance(t, ast.Name) and t.id == "info" for t in targets) and isinstance(value, ast.Call):
            return {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg}
    return None


def methods(folder: Path = TRAINERS) -> dict[str, Entry]:
    """All methods by name, in alphabetical order."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))}
    classes = [(stem, node) for stem, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)] for _, node in classes}

    def descends(cls: str) -> bool:
        return any(base == "Method" or descends(base) for base in bases.get(cls, []))

    found = {}
    for stem, node in classes:
        if descends(node.name) and (paper := _paper(node)) is not None:
            name = stem.replace("_", "-")
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            found[name] = Entry(name, summary, f"fastdiff.trainers.{stem}", node.name, paper)
    return found


def find(name: str) -> Entry:
    """The method called ``name``, or a ``UserError`` with the nearest one."""
    known = methods()
    if name not in known:
        raise UserError(f"no method '{name}'{nearest(name, known)} Methods: {', '.join(known)}.")
    return known[name]


@dataclass(kw_only=True)
class Options:
    json: bool = False
    """Print JSON for programs instead of a table for people."""


def _paragraph(entry: Entry) -> str:
    paper = entry.paper
    where = ", ".join(str(paper[k]) for k in ("venue", "year") if paper.get(k))
    arxiv = f" arXiv:{paper['arxiv']}" if paper.get("arxiv") else ""
    source = [f"    {paper['title']}" + (f" ({where})" if where else "") + arxiv] if paper.get("title") else []
    return "\n".join([f"{entry.name}", f"    {entry.summary}", *source])


def run(argv: Sequence[str]) -> int:
    """Print the methods."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="methods", description="List the distillation methods with their papers.")
    entries = methods().values()
    if chosen.json:
        rows = [{key: value for key, value in asdict(entry).items() if key != "paper"} | entry.paper for entry in entries]
        print(json.dumps(rows, indent=2))
    else:
        print("\n\n".join(map(_paragraph, entries)))
    return 0
