from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.data.fashion import GARMENTS, parse, random_captions
from fastdiff.eval.attributes import background_colour, foreground_colour
from fastdiff.eval.classifier import FashionClassifier
from fastdiff.eval.clip import ClipScore
from fastdiff.eval.fashion import REAL, REFERENCE, FashionMetrics, extractor_name, fashion_rows, features, real_images
from fastdiff.eval.scores import FeatureReference
from fastdiff.eval.stats import Stats

KEYS = "model steps nfe guidance_scale fd fd_se clip clip_se attributes attributes_se latency_ms_p50 latency_ms_p95"


@pytest.fixture(scope="module")
def classifier() -> FashionClassifier:
    torch.manual_seed(0)
    return FashionClassifier().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def metric(classifier, clip_folder) -> FashionMetrics:
    images = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return FashionMetrics(classifier, FeatureReference.of(stats_of(images, classifier)), ClipScore(clip_folder))


def stats_of(images: torch.Tensor, classifier: FashionClassifier) -> Stats:
    return Stats.of(features(images, classifier), extractor=extractor_name(classifier))


@pytest.fixture
def bank(tmp_path):
    """Six photographs of each garment: a block whose brightness says which."""
    grey = torch.zeros(60, 28, 28, dtype=torch.uint8)
    grey[:, 8:20, 8:20] = torch.arange(60, dtype=torch.uint8)[:, None, None] + 150
    path = tmp_path / "bank.safetensors"
    save_file({"grey": grey, "garment": torch.arange(10).repeat(6).to(torch.uint8)}, path)
    return path


def test_rows_of_teacher_student_and_real(teacher, student, metric, bank):
    shares: list[tuple[float, str]] = []
    results = fashion_rows(
        student,
        teacher,
        n=12,
        teacher_steps=(3, 1),
        guidance_scale=2.0,
        metric=metric,
        bank=bank,
        batch_size=8,
        repeats=1,
        progress=lambda share, label: shares.append((share, label)),
    )
    rows = [r.row() for r in results]
    assert [r["model"] for r in rows] == [
        "teacher (3 steps)",
        "teacher (1 step)",
        "student (1 step)",
        "real (held-out)",
    ]
    assert [r["nfe"] for r in rows] == [6, 2, 1, None]
    assert [r["guidance_scale"] for r in rows] == [2.0, 2.0, 1.0, None]
    costs = ["images_per_s", "peak_memory_mib", "energy_j", "parameters_m", "pipeline_parameters_m", "size_mb"]
    own = "fd_mean fd_cov n_duplicates"
    assert all(set(r) == {*KEYS.split(), *own.split(), *costs, "n"} for r in rows)
    assert all(r["n"] == 12 and r["fd"] > 0 and r["fd_se"] > 0 for r in rows)
    assert results[0].prompts == results[3].prompts == random_captions(12, 0)
    assert [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert shares[-1] == (pytest.approx(1.0), "student (1 step)")
    assert shares[1][0] == pytest.approx(7 / (7 + 3 + 2))  # the first row is done: calls and a decoder an image


def test_several_students_without_teacher(student, metric, bank):
    results = fashion_rows({"a": student, "b": student}, None, n=10, metric=metric, bank=bank, repeats=1)
    assert [r.model for r in results] == ["student a (1 step)", "student b (1 step)", "real (held-out)"]
    assert results[0].images.equal(results[1].images)
    assert results[0].metrics == results[1].metrics


def test_metrics_of_the_reference_images_themselves(classifier, clip_folder):
    images, texts = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(1)), random_captions(50, 0)
    own, garments = features(images, classifier), [GARMENTS[parse(text).garment] for text in texts]
    reference = FeatureReference.of(stats_of(images, classifier), features=own, groups=garments)
    scores = FashionMetrics(classifier, reference, ClipScore(clip_folder))(images, texts)
    values = scores.values
    assert values["fd"] == pytest.approx(0, abs=1e-9)
    assert {name: values[name] for name in ("precision", "recall", "coverage")} == dict(precision=1, recall=1, coverage=1)
    assert {"clip", "clip_se", "attributes", "attributes_se", "kid", "fd_mean", "n_duplicates"} <= values.keys()
    assert torch.equal(scores.features, own)
    assert scores.groups.keys() == {g for g in garments if garments.count(g) > 1}
    assert max(distance.value for distance in scores.groups.values()) < 1e-6


def test_the_bundled_reference_is_of_other_photographs_than_the_row_of_real_images() -> None:
    metric, bank = FashionMetrics.load(), load_file(REAL)
    assert metric.reference.features.shape == (7500, 32)
    assert Counter(metric.reference.groups) == dict.fromkeys(GARMENTS, 750)
    assert len(bank["grey"]) == 2500
    mean = Stats.of(metric.reference.features, extractor="x").mean
    every = metric.reference.stats
    assert every.n == 10_000
    spread = every.cov().diagonal().sqrt()
    assert ((mean - every.mean).abs() <= 5 * spread * (1 / 7500 - 1 / 10_000) ** 0.5).all()


def test_a_reference_of_another_classifier_is_refused(metric, clip_folder):
    torch.manual_seed(1)
    other = FashionMetrics(FashionClassifier().eval(), metric.reference, metric.clip)
    with pytest.raises(ValueError, match="different features"):
        other(torch.rand(9, 3, 32, 32), random_captions(9, 0))


def test_features_do_not_depend_on_the_batch(classifier):
    images = torch.rand(10, 3, 32, 32)
    torch.testing.assert_close(features(images, classifier, batch_size=1), features(images, classifier), rtol=1e-4, atol=1e-5)


def test_real_images_wear_the_colours_of_their_prompts(bank):
    prompts = random_captions(20, 4)
    images, asked = real_images(prompts, bank=bank), [parse(p) for p in prompts]
    background = background_colour(images)
    assert background.tolist() == [a.background for a in asked]
    assert foreground_colour(images, background).tolist() == [a.foreground for a in asked]


def test_no_photograph_is_shown_twice(bank):
    prompts = [f"a red {garment} on a black background" for garment in ["boot"] * 6 + ["bag"] * 6]
    centres = real_images(prompts, bank=bank)[:, 0, 16, 16]
    assert max(Counter(centres.tolist()).values()) == 1
    with pytest.raises(ValueError, match=r"7 prompts ask for a boot and .* has 6"):
        real_images(["a red boot on a black background"] * 7, bank=bank)


@pytest.mark.skipif(not (REFERENCE.exists() and REAL.exists()), reason="the bundled statistics are not there")
def test_bundled_real_images_lie_at_the_floor():
    classifier, reference = FashionClassifier.load(), Stats.load(REFERENCE)
    assert reference.n == 10_000
    assert reference.extractor == extractor_name(classifier)
    prompts = random_captions(2000, 0)
    images = real_images(prompts)
    from fastdiff.eval.attributes import attribute_score
    from fastdiff.eval.frechet import frechet

    assert attribute_score(images, prompts, classifier).value > 0.88
    real, blurred = (
        frechet(Stats.of(features(x, classifier), extractor=reference.extractor), reference).value
        for x in (images, torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2))
    )
    assert real < 0.1 * blurred
