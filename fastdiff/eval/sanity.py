"""What is wrong with a set before it is scored: every gate names what it saw and which number it would falsify.

``image_gates``, ``look_gates``, ``feature_gates`` and ``file_gates`` return findings; ``enforce`` raises on those that make a score
impossible and returns the rest as warnings, which belong beside the score.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.eval.duplicates import alike
from fastdiff.eval.looks import FINITE, FLAT, HASH, HIGHEST, LOWEST, MEAN, looks

MANY = 5
"""Below so many images a feature the bias c / n of FD is large: 10,240 at the 2,048 features of published protocols."""
_BLOCK = 256


@dataclass(frozen=True)
class Finding:
    """One gate that did not pass: its name, how many images it concerns, one sentence, and whether scoring must stop."""

    gate: str
    count: int
    message: str
    refuse: bool = False


def image_gates(images: Tensor, *, size: tuple[int, int] | None = None, duplicate_share: float = 0.01) -> list[Finding]:
    """Findings on ``images`` [N, 3, H, W] that should be finite, in [0, 1] and different.

    Args:
        size: height and width that the protocol asks for.
        duplicate_share: of perceptual duplicates that is still no finding.
    """
    if len(images) < 2:
        return [_few(len(images))]
    found = look_gates(torch.cat([looks(part) for part in images.split(_BLOCK)]), duplicate_share=duplicate_share)
    if size is None or tuple(images.shape[2:]) == size:
        return found
    seen = f"{images.shape[2]}x{images.shape[3]}"
    message = f"images are {seen}, the protocol's {size[0]}x{size[1]}: another resize, another score."
    return [*found, Finding("size", len(images), message)]


def look_gates(rows: Tensor, *, duplicate_share: float = 0.01) -> list[Finding]:
    """The findings of ``image_gates`` on images that are known by their ``looks`` [N, 72], two or more."""
    finite = rows[:, FINITE].bool()
    found = []
    if count := int((~finite).sum()):
        found.append(Finding("nan", count, f"{count} of {len(rows)} images are not finite: drop them, or no statistic is."))
    return found + (_pixel_gates(rows[finite], duplicate_share) if finite.any() else [])


def _pixel_gates(rows: Tensor, duplicate_share: float) -> list[Finding]:
    found, n = [], len(rows)
    low, high = rows[:, LOWEST].min().item(), rows[:, HIGHEST].max().item()
    if outside := int(((rows[:, LOWEST] < -1e-4) | (rows[:, HIGHEST] > 1 + 1e-4)).sum()):
        message = f"{outside} of {n} images leave [0, 1] (min {low:.3g}, max {high:.3g}): a missing (x + 1) / 2 or / 255."
        found.append(Finding("range", outside, message))
    if constant := int(rows[:, FLAT].sum()):
        found.append(
            Finding("constant", constant, f"{constant} of {n} images are of one colour: a dead decoder or a safety checker.")
        )
    if n > 1 and (rows == rows[0]).all():
        found.append(
            Finding("identical", n, f"all {n} images are identical: one seed for all, or a generator that ignores its noise.")
        )
    elif (count := int((alike(rows[:, HASH], rows[:, MEAN]) >= 0).sum())) > duplicate_share * n:
        found.append(
            Finding("duplicates", count, f"{count} of {n} images look like an earlier one ({count / n:.1%}): mode collapse?")
        )
    return found


def feature_gates(features: Tensor) -> list[Finding]:
    """Findings on ``features`` [n, d]: less than two rows, less rows than columns, few rows, rows that are not finite."""
    n, d = features.shape
    if n < 2:
        return [_few(n)]
    found = []
    if n < d:
        found.append(
            Finding("rank", n, f"{n} images for {d} features: the covariance is singular and FD mostly bias; see KID, FD_inf.")
        )
    if n < MANY * d:
        found.append(Finding("bias", n, f"{n} images, less than {MANY} a feature: FD is biased by c / n, compare at equal n only."))
    if count := int((~features.isfinite().all(dim=1)).sum()):
        found.append(Finding("nan", count, f"{count} of {n} feature rows are not finite: drop those images, or no statistic is."))
    return found


def file_gates(paths: Iterable[str | Path]) -> list[Finding]:
    """Findings on image files by their first bytes: JPEG has lost what the features see, whatever the file is called."""
    files = [Path(path) for path in paths]
    count = sum(_starts_as_jpeg(file) for file in files)
    if not count:
        return []
    return [
        Finding(
            "jpeg", count, f"{count} of {len(files)} files are JPEG: their artefacts move FD; compare with JPEG references only."
        )
    ]


def enforce(findings: Sequence[Finding]) -> list[str]:
    """The messages of all findings; ``ValueError`` with those that refuse a score."""
    refused = [f.message for f in findings if f.refuse]
    if refused:
        raise ValueError(" ".join(refused))
    return [f.message for f in findings]


def _few(n: int) -> Finding:
    return Finding("n", n, f"{n} images: a spread needs two or more.", refuse=True)


def _starts_as_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"
