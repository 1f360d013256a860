"""The policy for updates whose gradient is not finite: skip, report, and stop after so many in a row; never silently."""

import math
from collections import Counter
from typing import Any

from fastdiff.errors import UserError


class Health:
    """Counts bad updates, each kind for itself: a sound fake score must not hide a dead student."""

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps, self.total, self.updates = max_bad_steps, 0, 0
        self.in_a_row: Counter[str] = Counter()

    def accept(self, norm: float, *, update: str, step: int) -> bool:
        """True for a finite gradient norm.

        Raises:
            UserError: more than ``max_bad_steps`` bad updates of one kind in a row.
        """
        self.updates += 1
        if math.isfinite(norm):
            self.in_a_row[update] = 0
            return True
        self.in_a_row[update] += 1
        self.total += 1
        if self.in_a_row[update] > self.max_bad_steps:
            raise UserError(
                f"{self.in_a_row[update]} updates in a row had a gradient that is not finite, the last one {update} at "
                f"step {step}: training has diverged. Resume from the last checkpoint with a lower learning rate."
            )
        return False

    @property
    def share(self) -> float:
        """Bad updates among all."""
        return self.total / max(self.updates, 1)

    def state(self) -> dict[str, Any]:
        return {"in_a_row": dict(self.in_a_row), "total": self.total, "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total, self.updates = Counter(state["in_a_row"]), state["total"], state["updates"]
