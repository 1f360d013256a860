"""The few things that drawings need: scales, round ticks, escaped text.

Colours stand twice: as an attribute, for a drawing by itself, and as a class that a page's style overrides, so that a
drawing inside a page follows its dark or light scheme.
"""

import html
import math
from dataclasses import dataclass

COLOURS = {"ink": "#222", "muted": "#667", "rule": "#ccc", "student": "#c2410c", "teacher": "#2563eb", "frontier": "#15803d"}
CHARACTER = 6.6  # mean width of a character of 12 px text, in pixels, on the wide side


@dataclass(frozen=True)
class Scale:
    """From [low, high] to pixels [start, end], linear or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, *, octaves: bool = False) -> list[float]:
        """Round values inside the range: 1, 2, 5 times powers of ten; powers of two when ``octaves``; at most eight."""
        if not self.log:
            return _linear_ticks(self.low, self.high)
        if octaves:
            powers = [2.0**k for k in range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)]
            return _thinned(powers or _linear_ticks(self.low, self.high))
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            ticks = [m * 10.0**k for k in decades for m in digits if self.low <= m * 10.0**k <= self.high]
            if len(ticks) <= 8:
                break
        return _thinned(ticks or _linear_ticks(self.low, self.high))  # a narrow range may hold no round value


def text(x: float, y: float, value: str, *, kind: str = "ink", anchor: str = "start") -> str:
    """Escaped text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {paint(kind)} text-anchor="{anchor}">{html.escape(value)}</text>'


def line(path: str, kind: str, *, width: float = 1, dashed: bool = False) -> str:
    """A stroke along an SVG path."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    stroke = f'class="{kind}-line" stroke="{COLOURS[kind]}" stroke-width="{width}" stroke-linecap="round"'
    return f'<path d="{path}" fill="none" {stroke}{dash}/>'


def paint(kind: str) -> str:
    """The attributes that fill with a named colour."""
    return f'class="{kind}" fill="{COLOURS[kind]}"'


def drawing(width: float, height: float, parts: list[str], *, label: str) -> str:
    """The whole drawing, with a text for those who cannot see it."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12" font-family="system-ui, sans-serif" role="img"'
    return f'{head} aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def clipped(value: str, characters: int) -> str:
    """``value``, or its beginning and an ellipsis."""
    return value if len(value) <= characters else f"{value[: characters - 1]}…"


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thinned(ticks: list[float]) -> list[float]:
    return ticks[:: 1 + (len(ticks) - 1) // 8]
