"""The scores of each class: a table of all, and the worst ones of each model."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastdiff.eval.report.columns import COLUMNS, Row, better, finite, number
from fastdiff.eval.report.tables import Cell, Head, sortable
from fastdiff.eval.stats import Score

WORST, _OPEN = 10, 30
_READING = (
    "A Frechet distance of the few images of a class is biased upwards: compare the models on one class, never a class with the "
    "whole, and classes with each other only where they have equally many images."
)


class Scored(Protocol):
    """A value with its standard error, such as ``Score`` and ``FD``."""

    @property
    def value(self) -> float: ...

    @property
    def se(self) -> float: ...


Groups = Mapping[str, Mapping[Any, Scored]]  # by model and class


def groups_of(rows: Sequence[Row]) -> Groups:
    """The groups that rows hold as ``{class: [value, error]}``."""
    return {r["model"]: {name: Score(*pair) for name, pair in r["groups"].items()} for r in rows if r.get("groups")}


def worst(scores: Mapping[Any, Scored], *, column: str = "fd", count: int = WORST) -> list[Any]:
    """The ``count`` worst classes, the worst first; those without a finite value are left out."""
    sign = 1 if better(column) == "high" else -1
    known = [name for name, score in scores.items() if finite(score.value) is not None]
    return sorted(known, key=lambda name: sign * scores[name].value)[:count]


def classes(groups: Groups, column: str) -> str:
    """The section: worst classes of each model side by side, then one row a class and one column a model."""
    names = list(dict.fromkeys(name for scores in groups.values() for name in scores))
    ranked = [[(scores, name) for name in worst(scores, column=column)] for scores in groups.values()]
    ranks = range(max(map(len, ranked), default=0))
    lines = [[Cell(str(i + 1), i + 1), *(_ranked(models, i) for models in ranked)] for i in ranks]
    table = [[Cell(str(name)), *(_score(scores.get(name)) for scores in groups.values())] for name in names]
    label, opened = COLUMNS.get(column, column), " open" if len(names) <= _OPEN else ""
    way = better(column)
    return (
        f"<h2>Classes</h2><p class=quiet>{_READING if column == 'fd' else ''}</p>"
        f"<h3>{f'The worst {WORST} of {len(names)}' if len(names) > WORST else 'From the worst on'}</h3>"
        f"{sortable([Head('rank'), *map(Head, groups)], lines, label='worst classes')}"
        f"<details{opened}><summary>{label} of every class</summary>"
        f"{sortable([Head('class'), *(Head(model, better=way) for model in groups)], table, label='classes')}</details>"
    )


def _ranked(models: list[tuple[Mapping[Any, Scored], Any]], rank: int) -> Cell:
    if rank >= len(models):
        return Cell("-")
    scores, name = models[rank]
    score = _score(scores[name])
    return Cell(str(name), note=f"{score.text} {score.note}")


def _score(score: Scored | None) -> Cell:
    if score is None or finite(score.value) is None:
        return Cell("-")
    return Cell(number(score.value), score.value, "" if finite(score.se) is None else f"± {score.se:.2g}")
