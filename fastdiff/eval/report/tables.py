"""HTML tables whose columns sort, and lists of names and values. Every text is escaped here."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A text, what it sorts by (nothing sorts last, in either direction), a smaller text behind it, and a class."""

    text: str
    value: float | None = None
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Head:
    """A column's name, the end of it in smaller print, and which way is better: ``low``, ``high`` or nothing."""

    text: str
    note: str = ""
    better: str = ""


def sortable(head: Sequence[Head], rows: Iterable[Sequence[Cell]], *, label: str) -> str:
    """A table whose heads are buttons; its first column names the rows. ``page.js`` does the sorting."""
    lines = list(rows)
    numeric = [any(line[i].value is not None for line in lines) for i in range(len(head))]
    heads = "".join(_head(h, is_number) for h, is_number in zip(head, numeric, strict=True))
    body = "".join(f"<tr>{''.join(_cell(cell, first=not i) for i, cell in enumerate(line))}</tr>" for line in lines)
    name = html.escape(label)
    table = f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{table}</div>'


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, one a line."""
    lines = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_said(v))}</td></tr>" for k, v in facts.items())
    return f'<div class="scroll" role="region" tabindex="0" aria-label="facts"><table class="facts">{lines}</table></div>'


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _head(head: Head, is_number: bool) -> str:
    note = f"<small>{html.escape(head.note)}</small>" if head.note else ""
    better = f' data-better="{head.better}" title="{head.better}er is better"' if head.better else ""
    kind = "number" if is_number else "text"
    button = f'<button type="button">{html.escape(head.text)}{note}</button>'
    return f'<th scope="col" aria-sort="none" data-kind="{kind}"{better}>{button}</th>'


def _cell(cell: Cell, *, first: bool) -> str:
    value = "" if cell.value is None or math.isnan(cell.value) else f' data-value="{_javascript(cell.value)}"'
    note = f' <span class="se">{html.escape(cell.note)}</span>' if cell.note else ""
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f"<{tag}{scope}{kind}{value}>{html.escape(cell.text)}{note}</{tag}>"


def _javascript(value: float) -> str:
    """A number as JavaScript's ``Number`` reads it."""
    return repr(value).replace("inf", "Infinity")
