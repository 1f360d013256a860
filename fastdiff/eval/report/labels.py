"""Names beside points, placed so that they cover neither points nor one another."""

from dataclasses import dataclass

from fastdiff.eval.report.svg import CHARACTER, clipped

_LONGEST = 34
_AROUND = (
    (9, 4, "start"),
    (-9, 4, "end"),
    (8, -8, "start"),
    (8, 16, "start"),
    (-8, -8, "end"),
    (-8, 16, "end"),
    (0, -11, "middle"),
    (0, 20, "middle"),
)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, x: float, y: float, text: str, anchor: str) -> "Box":
        """About what 12 px text takes with its baseline at y."""
        width = CHARACTER * len(text)
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        return cls(left, y - 10, left + width, y + 3)

    def overlap(self, other: "Box") -> float:
        """The area that both cover, in square pixels."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)

    def holds(self, other: "Box") -> bool:
        """Whether the other one lies inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True)
class Spot:
    """Where a name stands."""

    x: float
    y: float
    text: str
    anchor: str

    @property
    def box(self) -> Box:
        return Box.of(self.x, self.y, self.text, self.anchor)


def place(name: str, x: float, y: float, taken: list[Box], inside: Box, *, must: bool = False) -> Spot | None:
    """The first spot around (x, y) that is free and inside; when there is none None, or the least covered if it ``must``."""
    spots = [Spot(x + dx, y + dy, clipped(name, _LONGEST), anchor) for dx, dy, anchor in _AROUND]
    costs = [sum(map(spot.box.overlap, taken)) + (0.0 if inside.holds(spot.box) else 1e4) for spot in spots]
    best = min(range(len(spots)), key=costs.__getitem__)
    return spots[best] if must or costs[best] == 0 else None
