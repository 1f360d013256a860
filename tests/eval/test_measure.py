"""A generator under a protocol: drawn to a folder, one pass of features, scores equal to the single functions'."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore
from fastdiff.eval.extractors import load_extractor
from fastdiff.eval.frechet import frechet
from fastdiff.eval.generate import generate
from fastdiff.eval.images import ImageFolder
from fastdiff.eval.instruments import open_extractor, open_instruments
from fastdiff.eval.measure import SHOWN, measure
from fastdiff.eval.prdc import prdc
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.reference import write_reference
from fastdiff.eval.sources import open_source
from fastdiff.eval.stats import Stats
from fastdiff.eval.subject import Subject

N = 24
PROMPTS = [f"prompt {i}" for i in range(N)]
PROTOCOL = Protocol(name="tiny", n=N, prompts="ours", preprocess="torch-bicubic", extractor="random-conv", reference="ours")


def noisy(name: str, level: float) -> Subject:
    def draw(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        return torch.cat([level * torch.rand(1, 3, 80, 80, generator=own) for own in generators])

    return Subject(name=name, generate=draw)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    generate(noisy("real", 1.0), PROMPTS, tmp_path / "real", seed=1)
    return tmp_path / "real"


def test_scores_are_those_of_the_features_of_the_files(tmp_path: Path, reference: Path) -> None:
    instruments = open_instruments(PROTOCOL, reference=reference, workers=0)
    measured = measure(noisy("dim", 0.7), PROMPTS, tmp_path / "dim", instruments, workers=0, repeats=1)
    extractor = load_extractor("random-conv")
    own, real = (extractor.features(ImageFolder(f)(torch.arange(N))) for f in (tmp_path / "dim", reference))
    want = frechet(Stats.of(own, extractor="x"), Stats.of(real, extractor="x"))
    row = measured.result.row()
    assert row["fd"] == pytest.approx(want.value, rel=1e-3)
    assert {"kid", "precision", "coverage", "fd_se", "images_per_s", "latency_ms_p50"} <= row.keys()
    assert instruments.label.startswith("FD[random-conv")
    assert measured.protocol.n == N
    assert measured.protocol.hash != PROTOCOL.hash
    assert any("singular" in text for text in measured.result.warnings)


def test_statistics_from_a_file_give_the_same_distance_as_the_folder_they_are_of(tmp_path: Path, reference: Path) -> None:
    of_folder = open_instruments(PROTOCOL, reference=reference, workers=0)
    write_reference(tmp_path / "real.npz", of_folder.reference.stats)
    of_file = open_instruments(PROTOCOL, reference=tmp_path / "real.npz")
    rows = [measure(noisy("dim", 0.7), PROMPTS, tmp_path / "dim", i, workers=0, repeats=0).result for i in (of_folder, of_file)]
    assert rows[0].metrics["fd"] == pytest.approx(rows[1].metrics["fd"], rel=1e-6)
    assert "kid" not in rows[1].metrics


def test_images_that_are_there_are_read_and_must_be_as_many_as_the_prompts(tmp_path: Path, reference: Path) -> None:
    instruments = open_instruments(PROTOCOL, reference=reference, workers=0)
    stored = open_source(str(reference))
    again = measure(stored, PROMPTS, reference, instruments, workers=0)
    assert again.result.metrics["fd"] == pytest.approx(0, abs=1e-4)
    assert again.result.latency_ms_p50 is None
    with pytest.raises(UserError, match="other prompts"):
        measure(stored, PROMPTS[:-1], reference, instruments, workers=0)


def test_a_protocol_with_patches_and_clip_has_both_columns(tmp_path: Path, reference: Path, clip_folder: Path) -> None:
    protocol = PROTOCOL.replace(patch_preprocess="centre64", clip_prefix="a ", clip_scale=1.0, clip_clamp="none", neighbours=3)
    instruments = open_instruments(protocol, reference=reference, clip=clip_folder, workers=0)
    row = measure(noisy("dim", 0.7), PROMPTS, tmp_path / "dim", instruments, workers=0, repeats=0).result.row()
    pictures, real = (ImageFolder(f)(torch.arange(N)) for f in (tmp_path / "dim", reference))
    extractor = load_extractor("random-conv")
    own, other = (extractor.features(images[:, :, 8:72, 8:72]) for images in (pictures, real))
    assert row["fd_patch"] == pytest.approx(frechet(Stats.of(own, extractor="x"), Stats.of(other, extractor="x")).value, rel=1e-3)
    assert row["fd_patch"] != pytest.approx(row["fd"], rel=1e-3)
    want = ClipScore(clip_folder, prefix="a ", scale=1.0, clamp="none", prepare="crop")(pictures, PROMPTS)
    assert (row["clip"], row["clip_se"]) == (pytest.approx(want.value, abs=1e-6), pytest.approx(want.se, abs=1e-6))
    assert row["precision"] == prdc(instruments.extractor.features(pictures), instruments.reference.features, k=3).precision


def test_the_extractor_is_the_protocols_with_its_preprocess(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would change nothing"):
        open_extractor(PROTOCOL, weights=tmp_path / "w.pt")
    with pytest.raises(UserError, match="'inception-2016'"):
        open_extractor(PROTOCOL.replace(extractor="inception-2016"))
    with pytest.raises(UserError, match="by clean, and the extractor pixel-pca does it by torch-bicubic alone"):
        open_extractor(PROTOCOL.replace(extractor="pixel-pca", preprocess="clean"))


def test_what_is_reported_is_what_was_done(tmp_path: Path, reference: Path) -> None:
    """Not what the protocol asks: other noise, truncation, resolution and ddof are written as they were, so the hash is of that."""
    asked = PROTOCOL.replace(preprocess="torch-bicubic:truncate", noise="batch", noise_batch=10, resolution=512, ddof=0)
    instruments = open_instruments(asked, reference=reference, workers=0)
    done = measure(noisy("dim", 0.7), PROMPTS, tmp_path / "dim", instruments, seed=7, workers=0, repeats=0).protocol
    assert (done.noise, done.noise_batch, done.resolution, done.ddof) == ("image", None, 80, 1)
    assert done.preprocess == "torch-bicubic"
    plain = open_instruments(PROTOCOL, reference=reference, workers=0)
    again = measure(open_source(str(tmp_path / "dim")), PROMPTS, tmp_path / "dim", plain, seed=0, workers=0).protocol
    assert again.seed == done.seed == 7  # the folder's, whatever is asked now
    assert again.hash == done.hash


def test_a_score_that_is_not_defined_is_left_out(tmp_path: Path, reference: Path) -> None:
    instruments = open_instruments(PROTOCOL, reference=reference, workers=0)
    row = measure(noisy("dim", 0.7), PROMPTS[:3], tmp_path / "three", instruments, workers=0, repeats=0).result.row()
    assert "kid" in row
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_gates_see_images_beyond_those_that_are_shown(tmp_path: Path, reference: Path, workers: int) -> None:
    """A collapse that begins at image 70."""
    n = SHOWN + 16

    def draw(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        own = [torch.rand(1, 3, 8, 8, generator=g) for g in generators]
        return torch.cat([x if int(p) < 70 else torch.full_like(x, 0.5) for p, x in zip(prompts, own, strict=True)])

    prompts = [str(i) for i in range(n)]
    instruments = open_instruments(PROTOCOL, reference=reference, workers=0)
    found = measure(Subject(name="dead", generate=draw), prompts, tmp_path / "dead", instruments, workers=workers, repeats=0)
    assert f"10 of {n} images are of one colour: a dead decoder or a safety checker." in found.result.warnings
    assert f"9 of {n} images look like an earlier one (11.2%): mode collapse?" in found.result.warnings
    assert not [text for text in found.result.warnings if "not finite" in text or "leave [0, 1]" in text]
    assert len(found.result.images) == SHOWN
