"""``fastdiff certify [METHOD ...]``: train methods on laws known in closed form until they recover them, and print by how much."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.loading import quiet
from fastdiff.cli.methods import find, methods
from fastdiff.cli.options import columns, nearest, parse
from fastdiff.errors import UserError
from fastdiff.files import aside

if TYPE_CHECKING:
    from fastdiff.proof.certify import Row


@dataclass(kw_only=True)
class Options:
    methods: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[METHOD ...]")] = ()
    """The methods to certify; without any, all of them."""
    law: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAW [LAW ...]")] = ()
    """Only on these laws: ring, gaussian, classes, images, or fixed-point. Without it, all that the method names."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="S [S ...]")] = (0,)
    """Seeds of starting network, noise and training; several are run one after the other."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the rows as JSON."""


def run(argv: Sequence[str]) -> int:
    """Certify, print, write; 1 when a bound was missed."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(
        options,
        argv,
        command="certify",
        description="Train each method by the real trainer on laws known in closed form, and measure what it recovered.",
    )
    entries = [find(name) for name in chosen.methods or methods()]
    quiet()
    from fastdiff.proof.certify import FIXED_POINT, certificates, certify
    from fastdiff.proof.laws import LAWS

    named_by_methods = [law for entry in methods().values() for law in certificates(entry.load())]
    known = list(dict.fromkeys([*LAWS, *named_by_methods, FIXED_POINT]))
    for law in chosen.law:
        if law not in known:
            raise UserError(f"no law '{law}'{nearest(law, known)} Laws: {', '.join(known)}.")
    jobs = []
    for cls in (entry.load() for entry in entries):
        named = certificates(cls)
        laws = [law for law in named if not chosen.law or law in chosen.law]
        if not laws and not chosen.methods:
            continue  # all methods were asked for, and this one has nothing of the kind
        if not laws:
            raise UserError(f"{cls.name()} is certified on {', '.join(named) or 'no law'}, not on {', '.join(chosen.law)}.")
        jobs += [(cls, law, seed) for law in laws for seed in chosen.seed]
    rows: list[Row] = []
    if chosen.json is not None:
        _write(chosen.json, rows)  # a file that cannot be written is no reason to lose hours later
    try:
        for cls, law, seed in jobs:
            rows += certify(cls, law, seed=seed)
            if chosen.json is not None:
                _write(chosen.json, rows)
    finally:  # what is proved stays when a later certificate is interrupted or diverges
        if rows:
            print(f"\n{table(rows)}\n")
    missed = [row for row in rows if not row.passed]
    if missed:
        print(f"{len(missed)} of {len(rows)} bounds were missed.")
    return 1 if missed else 0


def _write(path: Path, rows: "Sequence[Row]") -> None:
    with aside(path) as part:
        part.write_text(json.dumps([row.as_json() for row in rows], indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table(rows: "Sequence[Row]") -> str:
    """The rows for people: the value beside its bound, the teacher at as many network calls, and exact samples."""
    head = ("method", "law", "metric", "value", "bound", "teacher", "exact", "seed", "s", "")
    body = [
        (
            row.method,
            row.law,
            row.metric,
            f"{row.value:.3g}",
            f"{row.bound:g}",
            f"{row.baseline:.3g}",
            f"{row.floor:.3g}",
            str(row.seed),
            f"{row.seconds:.0f}",
            "ok" if row.passed else "MISSED",
        )
        for row in rows
    ]
    lines = columns([head, *body], left=3)
    masses = [f"masses of {r.method} on {r.law}: {' '.join(f'{m:.3f}' for m in r.details['masses'])}" for r in rows if r.details]
    return "\n".join([*lines, "", *masses]).rstrip()
