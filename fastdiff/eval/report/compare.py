"""What changed between two runs, and whether it is more than noise.

A difference exceeds the noise when |after - before| > 2 sqrt(se_before^2 + se_after^2), which holds for one unchanged
column in 20 by chance. The errors are taken as independent: for runs of the same prompts and noise that is cautious, and
``fastdiff.eval.paired`` is sharper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.errors import UserError
from fastdiff.eval.report.columns import Row, finite, named, shown_columns


@dataclass(frozen=True)
class Change:
    """One column of one model in two runs; None where a run has no value, or no error."""

    model: str
    column: str
    before: float | None
    after: float | None
    joint_se: float | None

    @property
    def difference(self) -> float | None:
        """after - before, in the column's unit."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def exceeds(self) -> bool | None:
        """Whether the difference is larger than twice the joint standard error; None when that is not known."""
        if self.difference is None or self.joint_se is None:
            return None
        return abs(self.difference) > 2 * self.joint_se


def changes(previous: Sequence[Row], now: Sequence[Row]) -> list[Change]:
    """Every numeric column of every model that both runs have, in the order of ``now``.

    Raises:
        UserError: two rows have one name, or rows of a model carry different protocols: their scores do not compare.
    """
    before, result = named(previous), []
    for model, row in named(now).items():
        if model not in before:
            continue
        old = before[model]
        if old.get("protocol") and row.get("protocol") and old["protocol"] != row["protocol"]:
            raise UserError(
                f"{model} was measured under {old['protocol']} before and {row['protocol']} now: scores of different "
                "protocols do not compare. Measure both under one."
            )
        for column in shown_columns([old, row]):
            values = finite(old.get(column)), finite(row.get(column))
            if values != (None, None):
                result.append(
                    Change(model, column, *values, _joint(finite(old.get(f"{column}_se")), finite(row.get(f"{column}_se"))))
                )
    return result


def _joint(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else math.hypot(before, after)
