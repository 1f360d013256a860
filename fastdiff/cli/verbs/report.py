"""``fastdiff eval report RESULT.json ... --output PAGE.html``: one page of result files."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdiff.cli.options import check_outputs, parse, result_file
from fastdiff.errors import UserError


@dataclass(kw_only=True)
class Options:
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RESULT [RESULT ...]")]
    """Result files of one protocol, or folders of `fastdiff distill`; their rows stand in one table."""
    output: Annotated[Path, tyro.conf.arg(metavar="HTML")]
    """Page to write; it loads nothing from elsewhere."""
    title: str = "fastdiff evaluation"
    """Its title."""
    previous: Annotated[Path | None, tyro.conf.arg(metavar="RESULT")] = None
    """An earlier result file: what changed against it gets a section."""
    sweep: Annotated[Path | None, tyro.conf.arg(metavar="RESULT")] = None
    """The file of `fastdiff eval sweep`, drawn as a surface."""
    log: Annotated[Path | None, tyro.conf.arg(metavar="JSONL")] = None
    """A run's log.jsonl: the curves of its losses."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """A grid of images, as `--grid` writes it."""


def run(argv: Sequence[str]) -> int:
    """Read, write the page."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="eval report", description="One self-contained page of result files.")
    if not chosen.files:
        raise UserError("nothing to report; give one or more result files.")
    from fastdiff.eval.protocol import Protocol, comparable
    from fastdiff.eval.report import html_report, joined_facts, read_curves, read_facts, read_rows

    check_outputs(output=chosen.output)
    files = [result_file(path) for path in chosen.files]
    facts = [read_facts(path) for path in files]
    rows = [row for path in files for row in read_rows(path)]
    protocols = [Protocol.of_record(found["protocol"]) for found in facts if "protocol" in found]
    if protocols and len(protocols) < len(facts):
        raise UserError("some of these files name a protocol and some do not: their scores cannot stand in one table.")
    for other in protocols[1:]:
        comparable(protocols[0], other)
    if len(tags := {row["protocol"] for row in rows if row.get("protocol")}) > 1:
        raise UserError(f"these rows are of {' and '.join(sorted(tags))}: different protocols cannot stand in one table.")
    score = _one_score(files, facts)
    machines = {name: found.get("environment", {}) for name, found in zip(_names(files), facts, strict=True)}
    html_report(
        chosen.output,
        rows,
        title=chosen.title,
        command=shlex.join(["fastdiff", "eval", "report", *argv]),
        facts=joined_facts({name: found.get("evaluation", {}) for name, found in zip(_names(files), facts, strict=True)}),
        protocol=protocols[0] if protocols else None,
        names=None if score is None else {"fd": score},
        curves=None if chosen.log is None else read_curves(chosen.log),
        previous=None if chosen.previous is None else read_rows(result_file(chosen.previous)),
        sweep=None if chosen.sweep is None else [r for r in read_rows(chosen.sweep) if r["model"].startswith("teacher")],
        picture=chosen.picture,
        machine=joined_facts(machines) or None,
    )
    print(f"report   {chosen.output}")
    return 0


def _names(files: Sequence[Path]) -> list[str]:
    """What the files are called among the facts: their names, or their paths where two have one name."""
    return [file.name if len({f.name for f in files}) == len(files) else str(file) for file in files]


def _one_score(files: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> str | None:
    """What the Frechet distance is called; ``UserError`` when it is of different networks."""
    known = [
        (file, found["evaluation"]["score"])
        for file, found in zip(files, facts, strict=True)
        if "score" in found.get("evaluation", {})
    ]
    if len({score for _, score in known}) > 1:
        said = ", ".join(f"{score} in {file}" for file, score in known)
        raise UserError(f"the distances of these files are of different networks, and cannot stand in one column: {said}.")
    return known[0][1] if known else None
