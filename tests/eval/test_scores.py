"""All scores of one feature pass are those of the single functions, and small sets leave out what they cannot have."""

import pytest
import torch

from fastdiff.eval.frechet import frechet
from fastdiff.eval.groups import group_frechet
from fastdiff.eval.kid import kid
from fastdiff.eval.prdc import prdc
from fastdiff.eval.scores import FeatureReference, Scores, feature_scores
from fastdiff.eval.stats import Stats


def normal(n: int, d: int = 3, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


X, OTHER = normal(400, shift=0.5), normal(600, seed=1)
NAMES = [f"c{i % 3}" for i in range(600)]
REFERENCE = FeatureReference.of(Stats.of(OTHER, extractor="x"), features=OTHER, groups=NAMES)


def test_each_number_is_that_of_its_own_function() -> None:
    scores = feature_scores(X, REFERENCE, extractor="x", groups=NAMES[:400])
    fd = frechet(Stats.of(X, extractor="x"), REFERENCE.stats, features=X)
    values = scores.values
    assert values["fd"] == pytest.approx(fd.value, rel=1e-9)
    assert values["fd_se"] == pytest.approx(fd.se, rel=1e-9)
    assert values["fd_mean"] + values["fd_cov"] == pytest.approx(fd.value, rel=1e-9)
    assert values["kid"] == kid(X, OTHER, subset_size=400).value
    assert values["recall"] == prdc(X, OTHER).recall
    assert 0 < values["fd_inf"] < values["fd"]
    alone = group_frechet(X, NAMES[:400], OTHER, NAMES)
    assert {name: found.value for name, found in scores.groups.items()} == {name: alone[name].value for name in ("c0", "c1", "c2")}
    assert (scores | {"clip": 1.0}).values == {**values, "clip": 1.0}


def test_statistics_alone_give_the_distance_and_small_sets_leave_out_what_they_cannot_have() -> None:
    alone = feature_scores(X[:20], FeatureReference.of(REFERENCE.stats), extractor="x")
    assert alone.values.keys() == {"fd", "fd_se", "fd_mean", "fd_cov"}
    few = feature_scores(X[:4], REFERENCE, extractor="x", groups=["c0", "c0", "c1", "c9"])
    assert {"precision", "fd_inf"}.isdisjoint(few.values)
    assert list(few.groups) == ["c0"]
    assert isinstance(few, Scores)


def test_features_of_another_extractor_are_refused() -> None:
    with pytest.raises(ValueError, match="different features"):
        feature_scores(X, REFERENCE, extractor="y")
