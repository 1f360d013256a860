"""``fastdiff eval compare BEFORE.json AFTER.json``: what differs by more than its error. Costs are for the page: they have none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastdiff.cli.options import columns, parse, result_file
from fastdiff.errors import UserError


@dataclass(kw_only=True)
class Options:
    files: Annotated[tyro.conf.Positional[tuple[Path, Path]], tyro.conf.arg(metavar="BEFORE AFTER")]
    """Two result files of `fastdiff eval --json`, or folders of `fastdiff distill`."""
    gate: bool = False
    """Exit with 1 when a score got worse by more than twice the joint standard error, or is no longer there."""


def run(argv: Sequence[str]) -> int:
    """Read both, refuse what does not compare, print the differences."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(
        options, argv, command="eval compare", description="Differences of two results; exit code 2 when protocols differ."
    )
    from fastdiff.eval.protocol import Protocol, comparable
    from fastdiff.eval.report import changes, read_facts, read_rows
    from fastdiff.eval.report.columns import better, score_columns

    before, after = ((read_rows(path), read_facts(path).get("protocol")) for path in map(result_file, chosen.files))
    if before[1] and after[1]:
        comparable(Protocol.of_record(before[1]), Protocol.of_record(after[1]))
    elif before[1] != after[1]:
        without = chosen.files[0] if after[1] else chosen.files[1]
        raise UserError(f"{without} names no protocol and the other file does: nobody can say that their scores compare.")
    found = changes(before[0], after[0])
    if not found:
        raise UserError(f"{chosen.files[0]} and {chosen.files[1]} have no model of one name.")
    scores = score_columns([*before[0], *after[0]])
    shown = [c for c in found if c.difference is not None and c.column in scores]
    head = ["model", "score", "before", "after", "difference", "2 x joint se", ""]
    lines = [
        [
            c.model,
            c.column,
            f"{c.before:.4g}",
            f"{c.after:.4g}",
            f"{c.difference:+.4g}",
            "-" if c.joint_se is None else f"{2 * c.joint_se:.3g}",
            {True: "differs", False: "", None: "no error known"}[c.exceeds],
        ]
        for c in shown
    ]
    print("\n".join(columns([head, *lines], left=2)))
    worse = [c for c in shown if c.exceeds and ((c.difference or 0) < 0) == (better(c.column) == "high")]
    if worse:
        print(f"\nworse: {', '.join(f'{c.column} of {c.model}' for c in worse)}")
    gone = [c for c in found if c.column in scores and c.before is not None and c.after is None]
    lost = {r["model"] for r in before[0]} - {r["model"] for r in after[0]}
    if gone or lost:
        print(f"\nno longer there: {', '.join([*sorted(lost), *(f'{c.column} of {c.model}' for c in gone)])}")
    return 1 if chosen.gate and (worse or gone or lost) else 0
