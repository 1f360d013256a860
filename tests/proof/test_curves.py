"""Reference curves: a run of a seed that made no band stays in it, and a run with another learning rate does not."""

from pathlib import Path

import pytest

import fastdiff.trainers
from fastdiff.proof.curves import curve, outside, write
from fastdiff.trainers.method import Method

CURVES = Path(__file__).parents[2] / "docs" / "results" / "curves"
METHODS = [getattr(fastdiff.trainers, name) for name in fastdiff.trainers.__all__]


@pytest.mark.parametrize("method", METHODS, ids=[method.name() for method in METHODS])
def test_a_short_run_stays_in_the_band_of_its_reference(method: type[Method]) -> None:
    assert outside(CURVES / f"{method.name()}.csv", curve(method, seed=3)) == []


def test_what_leaves_the_band_is_named(tmp_path: Path) -> None:
    write(tmp_path / "band.csv", [{("loss", 25): 1.0, ("loss", 50): 0.5}, {("loss", 25): 1.2, ("loss", 50): 0.6}])
    assert outside(tmp_path / "band.csv", {("loss", 25): 1.6, ("loss", 50): 0.3}) == []
    (said,) = outside(tmp_path / "band.csv", {("loss", 25): 1.0, ("loss", 50): 0.9})
    assert said == "loss at step 50 is 0.9, expected 0.5 .. 0.6"
    assert outside(tmp_path / "band.csv", {("loss", 25): 1.0, ("loss", 50): float("nan")})
    assert "other terms" in outside(tmp_path / "band.csv", {("loss", 25): 1.0})[0]
