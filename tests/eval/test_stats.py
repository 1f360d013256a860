import math

import pytest
import torch
from safetensors.torch import save_file

from fastdiff.eval.stats import Score, Stats
from fastdiff.files import aside


def features(n: int, d: int, *, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def test_moments_are_those_of_torch():
    x = features(200, 5, offset=3)
    stats = Stats.of(x, extractor="x")
    assert stats.n == 200
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.cov(), x.T.cov(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(stats.cov(ddof=0), x.T.cov(correction=0), rtol=1e-12, atol=1e-15)


def test_seven_shards_merge_to_the_batch():
    x = features(500, 6, offset=10)
    cuts = [1, 2, 90, 91, 260, 300]
    shards = [Stats.of(part, extractor="x") for part in x.tensor_split(cuts)]
    merged = shards[3]
    for i in (0, 6, 1, 5, 2, 4):
        merged = merged.merge(shards[i])
    whole = Stats.of(x, extractor="x")
    assert merged.n == whole.n
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-10, atol=1e-10)


def test_a_large_mean_does_not_cancel_in_a_stream():
    x = features(300, 3, offset=1e7)
    stats = Stats.of(x[:100], extractor="x").update(x[100:150]).update(x[150:])
    torch.testing.assert_close(stats.cov(), (x - 1e7).T.cov(), rtol=1e-6, atol=1e-8)
    raw = (x.T @ x - 300 * torch.outer(x.mean(0), x.mean(0))) / 299
    assert (raw - stats.cov()).abs().max() > 1e-3  # what running sums of x and x x^T would give


def test_half_precision_features_are_summed_in_float64():
    x = features(4000, 2, offset=100).half()
    torch.testing.assert_close(Stats.of(x, extractor="x").mean, x.double().mean(0), rtol=1e-12, atol=0)


def test_statistics_of_different_networks_are_refused():
    a = Stats.of(features(9, 3), extractor="one")
    with pytest.raises(ValueError, match=r"'one' \[3\] and 'other' \[3\]"):
        a.merge(Stats.of(features(9, 3), extractor="other"))
    with pytest.raises(ValueError, match="different features"):
        a.update(features(9, 4))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, 2)])
def test_features_that_are_no_matrix_are_refused(bad):
    with pytest.raises(ValueError, match="one row an image"):
        Stats.of(bad, extractor="x")


def test_one_nan_image_is_named_not_averaged():
    x = features(10, 3)
    x[4, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 10 feature rows are not finite"):
        Stats.of(x, extractor="x")


def test_a_covariance_needs_two_images():
    with pytest.raises(ValueError, match="more than 1 images, got 1"):
        Stats.of(features(1, 3), extractor="x").cov()


def test_a_file_keeps_every_bit(tmp_path):
    stats = Stats.of(features(50, 4), extractor="network#1234")
    stats.save(tmp_path / "sub" / "stats.safetensors")
    loaded = Stats.load(tmp_path / "sub" / "stats.safetensors")
    assert (loaded.n, loaded.extractor) == (50, "network#1234")
    assert loaded.mean.equal(stats.mean)
    assert loaded.m2.equal(stats.m2)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["stats.safetensors"]


def test_a_foreign_file_is_refused(tmp_path):
    save_file({"mean": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no feature statistics"):
        Stats.load(tmp_path / "weights.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")

    def write() -> None:
        with aside(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_score_is_a_mean_with_its_standard_error():
    score = Score.of(torch.tensor([True, True, True, False]))
    assert score.value == 0.75
    assert score.se == pytest.approx(0.5 / 2)  # sd of 1, 1, 1, 0 is 0.5
    assert math.isnan(Score.of(torch.ones(1)).se)
