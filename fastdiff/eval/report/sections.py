"""The sections of a page that need more than one call: scores, changes, frontiers, images, how it was made."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Result
from fastdiff.eval.protocol import COMMENTARY, Protocol
from fastdiff.eval.report.columns import (
    COLUMNS,
    SETTINGS,
    Row,
    better,
    cost_columns,
    finite,
    named,
    number,
    plus_minus,
    score_columns,
    shown_columns,
)
from fastdiff.eval.report.compare import Change, changes
from fastdiff.eval.report.curves import Curve, curve_svg
from fastdiff.eval.report.pareto import AXES, frontier_of, pareto_svg
from fastdiff.eval.report.pictures import data_uri, inline
from fastdiff.eval.report.surface import surface_svg
from fastdiff.eval.report.tables import Cell, Head, facts_table, sortable

_READING = (
    "± is one standard error. NFE counts passes of one image through the network: guidance counts two. FD is biased by "
    "the number of images n: compare rows of equal n only; the row of real images is its floor."
)
_COSTS = (
    "Latency is that of one image by itself, from prompt to pixels, after warm-up; images/s and J/image those of large batches."
)
_CHANGES = (
    "A difference counts as more than noise beyond twice the joint standard error, the root of the sum of both squared. Of values "
    "that did not change one in twenty gets there by chance; values without an error are not judged."
)
_PNG = b"\x89PNG\r\n\x1a\n"


def heads_of(rows: Sequence[Row], protocol: Protocol | None, names: Mapping[str, str]) -> dict[str, Head]:
    """The head of every column; under a protocol that of a score ends in its number of images and hash."""
    heads = {c: Head(names.get(c, COLUMNS.get(c, c)), better=better(c)) for c in shown_columns(rows)}
    if protocol is not None:
        names = {"fd": f"FD[{protocol.extractor}]", **names}
        for c in score_columns(rows):
            name = names.get(c, heads[c].text)
            heads[c] = Head(name, protocol.label(name).removeprefix(name), better(c))
    return heads


def scores(rows: Sequence[Row], heads: Mapping[str, Head]) -> str:
    """The table of scores, and the table of costs."""
    known = shown_columns(rows)
    parts = []
    if found := score_columns(rows):
        parts.append("<h2>Scores</h2>" + _table(rows, [c for c in (*SETTINGS, *found, "n") if c in known], heads, "scores"))
        parts.append(f'<p class="quiet">{_READING}</p>')
    if found := cost_columns(rows):
        parts.append("<h2>Cost</h2>" + _table(rows, [c for c in (*SETTINGS, *found) if c in known], heads, "cost"))
        parts.append(f'<p class="quiet">{_COSTS}</p>')
    return "".join(parts) or _table(rows, known, heads, "results")


def _table(rows: Sequence[Row], columns: Sequence[str], heads: Mapping[str, Head], label: str) -> str:
    lines = [[_value(row, c) for c in columns] for row in rows]
    return sortable([heads[c] for c in columns], lines, label=label)


def _value(row: Row, column: str) -> Cell:
    value = row.get(column)
    return Cell(number(value), float(value) if isinstance(value, int | float) else None, plus_minus(row, column))


def changed(previous: Sequence[Row], rows: Sequence[Row], heads: Mapping[str, Head]) -> str:
    """What differs from an earlier run."""
    found, before, now = changes(previous, rows), named(previous), named(rows)
    moved = [c for c in found if c.difference != 0]
    parts = [f'<h2>What changed against the previous run</h2><p class="quiet">{_CHANGES}</p>']
    for word, models in (("New", [m for m in now if m not in before]), ("Gone", [m for m in before if m not in now])):
        if models:
            parts.append(f"<p>{word}: {html.escape(', '.join(models))}.</p>")
    if moved:
        head = [Head(t) for t in ("model", "column", "before", "after", "difference", "beyond 2 se")]
        names = {c: heads[c].text if c in heads else COLUMNS.get(c, c) for c in {change.column for change in moved}}
        parts.append(sortable(head, [_change(c, names[c.column]) for c in moved], label="changes"))
    if same := len(found) - len(moved):
        parts.append(f'<p class="quiet">{same} value{"s are" if same > 1 else " is"} as before.</p>')
    return "".join(parts)


def _change(change: Change, name: str) -> list[Cell]:
    difference, way = change.difference, better(change.column)
    kind = ""
    if change.exceeds and difference is not None and way:
        kind = "better" if (difference < 0) == (way == "low") else "worse"
    joint = "" if change.joint_se is None or difference is None else f"± {change.joint_se:.2g}"
    shown = Cell("-") if difference is None else Cell(f"{difference:+.4g}", difference, joint, kind)
    beyond = {None: "not known", True: f"yes, {kind}" if kind else "yes", False: "no"}[change.exceeds]
    sides = [Cell(number(v), v) for v in (change.before, change.after)]
    return [Cell(change.model), Cell(name), *sides, shown, Cell(beyond, kind=kind)]


def frontiers(rows: Sequence[Row], heads: Mapping[str, Head]) -> str:
    """Quality against each cost that is known, with the members of the frontier by name."""
    known = [c for c in score_columns(rows) if better(c)]
    if not known:
        return ""
    quality = "fd" if "fd" in known else known[0]
    costs = [c for c in AXES if any(finite(r.get(c)) is not None and finite(r.get(quality)) is not None for r in rows)]
    figures = [_figure(rows, cost, quality, heads[quality].text) for cost in costs]
    return f'<h2>Quality against cost</h2><div class="figures">{"".join(figures)}</div>' if figures else ""


def _figure(rows: Sequence[Row], cost: str, quality: str, label: str) -> str:
    members = ", ".join(r["model"] for r in frontier_of(rows, cost, quality))
    caption = f"Frontier: {html.escape(members)}."
    return f"<figure>{pareto_svg(rows, cost=cost, quality=quality, label=label)}<figcaption>{caption}</figcaption></figure>"


def images(results: Sequence[Result], columns: int) -> str:
    """The grid: one row a model, one column a prompt and its noise."""
    prompts = results[0].prompts[:columns]
    head = "".join(f'<th scope="col">{html.escape(prompt)}</th>' for prompt in prompts)
    body = "".join(f'<tr><th scope="row">{html.escape(r.model)}</th>{_strip(r, prompts)}</tr>' for r in results)
    table = f'<table class="grid"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    says = "Models drew the images of a column for one prompt from the same initial noise where their latents have one shape."
    region = '<div class="scroll" role="region" tabindex="0" aria-label="images">'
    return f'<h2>Images</h2><p class="quiet">{says}</p>{region}{table}</div>'


def _strip(result: Result, prompts: Sequence[str]) -> str:
    pairs = zip(result.images[: len(prompts)], prompts, strict=False)
    smooth = ' class="reduced"' if max(result.images.shape[-2:]) > 96 else ""
    return "".join(
        f'<td><img{smooth} alt="{html.escape(f"{result.model}: {prompt}")}" src="{inline(image)}"></td>' for image, prompt in pairs
    )


def picture(path: str | Path) -> str:
    """A grid that was written before."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the picture {path}: {error}. Give the PNG that an evaluation wrote.") from error
    if not content.startswith(_PNG):
        raise UserError(f"{path} is no PNG: give the grid that an evaluation wrote.")
    region = '<div class="scroll" role="region" tabindex="0" aria-label="images">'
    says = "one row a model, one column a prompt and its noise"
    return f'<h2>Images</h2>{region}<img class="picture" alt="{says}" src="{data_uri(content)}"></div>'


def surface(sweep: Sequence[Row], rows: Sequence[Row]) -> str:
    """The heat map of a teacher, with the students among the rows."""
    students = [r for r in rows if r["model"].startswith("student") and r.get("steps") is not None]
    figure = f'<div class="scroll" role="region" tabindex="0" aria-label="steps and guidance">{surface_svg(sweep, students)}</div>'
    says = "FD of the teacher by steps and guidance, under it that of the students at their own steps; the best is outlined."
    return f"<h2>Steps and guidance</h2><figure>{figure}<figcaption>{says}</figcaption></figure>"


def training(curves: Mapping[str, Curve]) -> str:
    """One small drawing a term."""
    says = "Lines are means over spans of steps, bands go from the least to the largest value of a span."
    figures = "".join(f"<figure>{curve_svg(curve, label=name)}</figure>" for name, curve in curves.items())
    return f'<h2>Training</h2><p class="quiet">{says}</p><div class="figures small">{figures}</div>'


def choices(protocol: Protocol) -> str:
    """The protocol: hash, commentary and every choice."""
    about = {f.name: v for f in fields(protocol) if f.name in COMMENTARY[1:] and (v := getattr(protocol, f.name))}
    values = {k: "left open" if v is None or v in ("", ()) else v for k, v in protocol.choices.items()}
    says = "The hash is of the choices. Scores of another hash are scores of something else."
    head = f"{html.escape(protocol.name)} <code>#{protocol.hash}</code>"
    details = f"<details open><summary>All {len(values)} choices</summary>{facts_table(values)}</details>"
    return f'<h2>Protocol {head}</h2><p class="quiet">{says}</p>{facts_table(about) if about else ""}{details}'


def making(command: str, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """Command, facts and environment."""
    shown = f"<pre>{html.escape(command)}</pre>" if command else ""
    of_run = facts_table(facts) if facts else ""
    return f"<h2>How it was made</h2>{shown}{of_run}<h3>Environment</h3>{facts_table(machine)}"
