"""One self-contained page of results, from an evaluation in memory or from the rows that one wrote.

The page loads nothing: styles, the script that sorts its tables, images and drawings are inside, and its Content Security
Policy forbids all else. The policy names the style and the script by their hashes, so that a text that got in unescaped
would still not run.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Result
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.report import sections
from fastdiff.eval.report.classes import Groups, classes, groups_of
from fastdiff.eval.report.columns import Row
from fastdiff.eval.report.curves import Curve
from fastdiff.eval.report.machine import environment
from fastdiff.eval.report.rows import rows_of
from fastdiff.files import aside

_HERE = Path(__file__).parent


def html_report(
    path: str | Path,
    results: Sequence[Result | Row],
    *,
    title: str = "fastdiff evaluation",
    command: str = "",
    facts: Mapping[str, Any] | None = None,
    columns: int = 10,
    protocol: Protocol | None = None,
    names: Mapping[str, str] | None = None,
    groups: Groups | None = None,
    group_score: str = "fd",
    curves: Mapping[str, Curve] | None = None,
    previous: Sequence[Row] | None = None,
    sweep: Sequence[Row] | None = None,
    picture: str | Path | None = None,
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Write the page; a section whose matter is not given is left out.

    Args:
        results: what ``evaluate`` gave, or rows of ``read_rows``; rows have no images.
        command: shown as given, the line that makes the page again.
        facts: further name-value pairs, such as the conventions of the CLIP score, the seed or the time of training.
        columns: prompts in the grid of images.
        protocol: under which all rows were measured; the heads of the scores carry its hash.
        names: of scores, such as ``{"fd": extractor.label}``; with a protocol FD is ``FD[<its extractor>]`` by itself.
        groups: model to class to a value with its error, such as ``FD`` or ``Score``; by default those that the rows hold.
        group_score: the column that ``groups`` are of, which says which way is better.
        curves: of training, from ``read_curves``.
        previous: rows of an earlier run to compare with.
        sweep: rows of a teacher over ``steps`` and ``guidance_scale``; its students are the rows called "student ...".
        picture: a PNG of ``grid_png``, for rows that have no images.
        machine: where the rows were measured; by default here and now (``environment``).

    Raises:
        UserError: there are no rows, their n is not the protocol's, or one of the parts says why it cannot be shown.
    """
    rows = rows_of(results)
    if not rows:
        raise UserError("a report needs one result or more: evaluate a model first.")
    if protocol is not None and (other := [r for r in rows if r.get("n") != protocol.n]):
        raise UserError(
            f"{other[0]['model']} has n={other[0].get('n')}, {protocol.name} says n={protocol.n}: its hash would stand behind "
            f"scores of another n. Pass protocol.replace(n={other[0].get('n')})."
        )
    tag = {} if protocol is None else {"protocol": f"{protocol.name}#{protocol.hash}"}
    heads = sections.heads_of(rows, protocol, names or {})
    pictures = [r for r in results if isinstance(r, Result)]
    groups = groups_of(rows) if groups is None else groups
    body = [
        f"<h1>{html.escape(title)}</h1>",
        sections.scores(rows, heads),
        sections.changed(previous, [{**r, **tag} for r in rows], heads) if previous is not None else "",
        sections.frontiers(rows, heads),
        sections.images(pictures, columns) if pictures else sections.picture(picture) if picture else "",
        sections.surface(sweep, rows) if sweep else "",
        classes(groups, group_score) if groups else "",
        sections.training(curves) if curves else "",
        sections.choices(protocol) if protocol is not None else "",
        sections.making(command, facts or {}, environment() if machine is None else machine),
    ]
    with aside(path) as part:
        part.write_text(_page(title, "\n".join(filter(None, body))), encoding="utf-8")


def _page(title: str, body: str) -> str:
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
