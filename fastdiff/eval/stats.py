"""First and second moments of a set of features, and a mean with its standard error.

``Stats`` holds (n, mean, M2) in float64, where M2 = sum (x - mean)(x - mean)^T. Two sets merge exactly by Chan's
formula

    delta = mean_b - mean_a,   mean = mean_a + delta n_b / n,   M2 = M2_a + M2_b + delta delta^T n_a n_b / n,

which does not cancel as sum x x^T - n mean mean^T does, so shards, streams and one batch agree to 1e-10.
(Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.files import aside

FORMAT = "fastdiff-stats-1"


@dataclass(frozen=True)
class Score:
    """A mean over images and its standard error, in the score's own unit."""

    value: float
    se: float

    @classmethod
    def of(cls, values: Tensor) -> "Score":
        """Mean of ``values`` [N] and sd / sqrt(N) with the unbiased sd; the error of a single value is nan."""
        values = values.double()
        return cls(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan"))


@dataclass(frozen=True, eq=False)
class Stats:
    """n, mean [d] and M2 [d, d] of features, with the name of what extracted them.

    >>> stats = Stats.of(features[:500], extractor="inception-2015").update(features[500:])
    >>> stats.cov()                                        # [d, d] float64
    """

    n: int
    mean: Tensor
    m2: Tensor
    extractor: str

    @classmethod
    def of(cls, features: Tensor, *, extractor: str) -> "Stats":
        """The statistics of ``features`` [N, d], N >= 1; ``ValueError`` when they are no matrix or not finite."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features have shape {tuple(features.shape)}: expected [N, d] with N >= 1, one row an image.")
        if not features.isfinite().all():
            bad = (~features.isfinite().all(dim=1)).sum().item()
            raise ValueError(f"{bad} of {len(features)} feature rows are not finite: the mean would be nan. Drop those images.")
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(dim=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean), extractor)

    def update(self, features: Tensor) -> "Stats":
        """These statistics with ``features`` [N, d] added."""
        return self.merge(type(self).of(features, extractor=self.extractor))

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both sets together, exactly; ``ValueError`` when they are of different features."""
        comparable(self, other)
        n, delta = self.n + other.n, other.mean - self.mean
        m2 = self.m2 + other.m2 + torch.outer(delta, delta) * (self.n * other.n / n)
        return type(self)(n, self.mean + delta * (other.n / n), m2, self.extractor)

    def cov(self, ddof: int = 1) -> Tensor:
        """Covariance M2 / (n - ddof) [d, d]; ``ValueError`` for n <= ddof."""
        if self.n <= ddof:
            raise ValueError(f"a covariance with ddof={ddof} needs more than {ddof} images, got {self.n}.")
        return self.m2 / (self.n - ddof)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (mean, m2; n and extractor in its JSON header), aside and then renamed."""
        header = json.dumps({"n": self.n, "extractor": self.extractor})
        with aside(path) as part:
            save_file({"mean": self.mean, "m2": self.m2}, part, metadata={"format": FORMAT, "stats": header})

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read what ``save`` wrote; ``ValueError`` when the file holds something else."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} holds no feature statistics: its header says {metadata}, expected format {FORMAT!r}.")
            header = json.loads(metadata["stats"])
            return cls(header["n"], file.get_tensor("mean"), file.get_tensor("m2"), header["extractor"])


def comparable(a: Stats, b: Stats) -> None:
    """``ValueError`` unless both are statistics of the same features."""
    if a.extractor != b.extractor or a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {a.extractor!r} [{len(a.mean)}] and {b.extractor!r} [{len(b.mean)}] are of different "
            "features, and a distance between them means nothing. Extract both with the same network."
        )
