"""All scores of one feature pass: the features of the images beside those of a reference set.

| key | what |
|---|---|
| ``fd``, ``fd_se``, ``fd_mean``, ``fd_cov`` | Frechet distance, its standard error, and its two terms |
| ``fd_inf``, ``fd_inf_se`` | extrapolated to infinitely many images, where the bias of n is gone |
| ``kid``, ``kid_se`` | kernel distance, unbiased, in units of the polynomial kernel (no factor of 1000) |
| ``precision``, ``recall``, ``density``, ``coverage`` | k nearest neighbours among the reference images |
| ``mind`` | sliced Wasserstein distance of the features |

A reference without its own features (statistics from a file) gives the first two rows alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.eval.fd_infinity import fd_infinity
from fastdiff.eval.frechet import FD, covariance_factor, frechet
from fastdiff.eval.groups import group_frechet
from fastdiff.eval.kid import kid
from fastdiff.eval.mind import mind
from fastdiff.eval.prdc import prdc
from fastdiff.eval.stats import Stats


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureReference:
    """What features are measured against: statistics, and as far as they are at hand the features themselves.

    ``features`` [m, d] may be fewer images than the statistics are of; ``groups`` names the class of each of them.
    """

    stats: Stats
    root: Tensor
    features: Tensor | None = None
    groups: Sequence[str] = ()

    @classmethod
    def of(cls, stats: Stats, *, features: Tensor | None = None, groups: Sequence[str] = ()) -> "FeatureReference":
        """With the root of the covariance, which every distance needs again."""
        return cls(stats=stats, root=covariance_factor(stats), features=features, groups=groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Named numbers, the distance of each class, and the features they came from (for paired differences)."""

    values: Mapping[str, float]
    groups: Mapping[str, FD] = field(default_factory=dict)
    features: Tensor | None = None

    def __or__(self, more: Mapping[str, float]) -> "Scores":
        return Scores(values={**self.values, **more}, groups=self.groups, features=self.features)


def feature_scores(
    features: Tensor, reference: FeatureReference, *, extractor: str, groups: Sequence[str] = (), k: int = 5
) -> Scores:
    """Every score of the table above for ``features`` [n, d] of one extractor.

    Args:
        extractor: the ``id`` behind the features; that of the reference's statistics, or a ``ValueError`` follows.
        groups: the class of each row, where the reference names its own.
        k: of precision, recall, density and coverage.

    Where n is too small a key is left out: FD-infinity below 8 (d + 1) images, precision and its kin below k + 1, a class below 2,
    an error that is not defined.
    """
    n, d = features.shape
    fd = frechet(Stats.of(features, extractor=extractor), reference.stats, features=features, root=reference.root)
    values = {"fd": fd.value, "fd_se": fd.se, "fd_mean": fd.mean_term, "fd_cov": fd.cov_term}
    if n >= 8 * (d + 1):
        sizes = tuple(dict.fromkeys(int(size) for size in torch.linspace(max(n // 8, 2 * (d + 1)), n, 15).round().tolist()))
        limit = fd_infinity(features, reference.stats, sizes=sizes, root=reference.root)
        values |= {"fd_inf": limit.value, "fd_inf_se": limit.se}
    if reference.features is None:
        return Scores(values=values, features=features)
    other = reference.features
    kernel = kid(features, other, subset_size=min(1000, n, len(other)))
    values |= {"kid": kernel.value, "kid_se": kernel.se}
    if k < min(n, len(other)):
        found = prdc(features, other, k=k)
        values |= {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}
    values["mind"] = mind(features, other)
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # a spread of too few has none
    return Scores(values=values, groups=_groups(features, groups, other, reference.groups), features=features)


def _groups(features: Tensor, groups: Sequence[str], other: Tensor, other_groups: Sequence[str]) -> dict[str, FD]:
    counts = [Counter(names) for names in (groups, other_groups)]
    enough = {name for name in counts[0] if min(count[name] for count in counts) > 1}
    rows = [[i for i, name in enumerate(names) if name in enough] for names in (groups, other_groups)]
    if not enough:
        return {}
    kept = [[names[i] for i in at] for names, at in zip((groups, other_groups), rows, strict=True)]
    return dict(sorted(group_frechet(features[rows[0]], kept[0], other[rows[1]], kept[1]).items()))
