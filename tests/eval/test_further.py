"""Scores that are asked for by name: each equal to its own function, and refused where its name would be wrong."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdiff.cli.main import main
from fastdiff.errors import UserError
from fastdiff.eval import inception as port
from fastdiff.eval.cmmd import cmmd
from fastdiff.eval.encoders import open_clip_model
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import load_extractor
from fastdiff.eval.frechet import frechet
from fastdiff.eval.further import cmmd_of, inception_score_of, memorisation_of, sfid_of
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.inception import inception
from fastdiff.eval.inception_score import inception_score
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.report import read_facts, read_rows
from fastdiff.eval.stats import Stats

N, PASS = 4, {"workers": 0, "batch_size": 4}


def pictures(folder: Path, *, n: int = N, seed: int = 0, side: int = 24) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for i in range(n):
        level = draw.integers(40, 216, (1, 1, 3))
        pixels = (level + draw.integers(-40, 40, (side, side, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return pictures(tmp_path / "reference", seed=1)


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        'n = 4\nprompts = "unconditional"\npreprocess = "torch-bicubic"\nextractor = "random-conv"\nreference = "mine"\n'
    )
    return path


def test_the_inception_score_needs_no_second_pass(images: Path, inception_weights: Path) -> None:
    pool, second = (inception(inception_weights, verify=False, layer=layer) for layer in ("pool", "logits_unbiased"))
    features, logits = (features_of_folder(images, extractor, **PASS) for extractor in (pool, second))
    for splits, options in (("2 splits", {"splits": 2}), ("splits of 3", {"split_size": 3, "seed": None})):
        found = inception_score_of(pool, splits).score(features, ImageFolder(images))
        want = inception_score(logits, **options)
        assert found["inception_score"] == pytest.approx(want.value, rel=1e-5)
        assert found["inception_score_sd"] == pytest.approx(want.sd, rel=1e-3, abs=1e-7)
        assert want.value > 1


def test_an_inception_score_of_another_network_or_of_a_script_or_without_splits_is_refused(inception_weights: Path) -> None:
    with pytest.raises(UserError, match=r"random-conv.* has no last layer at hand"):
        inception_score_of(load_extractor("random-conv"), "10 splits")
    script = FeatureExtractor(name="inception-2015", network=nn.Identity(), preprocess=Preprocess("clean"), dim=2048)
    with pytest.raises(UserError, match="a TorchScript gives the pool layer only"):
        inception_score_of(script, "10 splits")
    with pytest.raises(UserError, match="expected such as '10 splits' or 'splits of 5000'"):
        inception_score_of(inception(inception_weights, verify=False), "ten")


def test_the_distance_of_spatial_features_is_that_of_the_layer(images: Path, reference: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())  # 27 numbers in the place of 2023
    extractor = FeatureExtractor(
        name="inception-2015", network=network, preprocess=Preprocess("none", "none"), dim=27, layer="mixed_6", digest="0" * 8
    )
    own, other = (features_of_folder(folder, extractor, **PASS) for folder in (images, reference))
    stats = Stats.of(other, extractor=extractor.id)
    want = frechet(Stats.of(own, extractor=extractor.id), stats, features=own)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=stats.mean.numpy(), sigma_s=stats.cov().numpy())
    for given in (reference, tmp_path / "adm.npz"):
        further = sfid_of(extractor, given, extractor, **PASS)
        found = further.score(torch.empty(N, 0), ImageFolder(images), **PASS)
        assert found["sfd"] == pytest.approx(want.value, rel=1e-3)
        assert further.name == "sFD"  # these weights are not the published ones
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="an npz with mu_s and sigma_s"):
        sfid_of(extractor, tmp_path / "plain.npz", extractor)


def test_cmmd_is_of_the_embeddings_and_needs_images(images: Path, reference: Path, clip_folder: Path, tmp_path: Path) -> None:
    extractor = open_clip_model(clip_folder)
    own, other = (features_of_folder(folder, extractor, **PASS) for folder in (images, reference))
    found = cmmd_of(clip_folder, reference, **PASS).score(torch.empty(N, 0), ImageFolder(images), **PASS)
    assert found["cmmd"] == pytest.approx(cmmd(own, other), abs=1e-9)
    with pytest.raises(UserError, match="give --reference a folder"):
        cmmd_of(clip_folder, tmp_path / "statistics.npz")


def test_copies_of_training_images_are_counted(images: Path, tmp_path: Path) -> None:
    training = pictures(tmp_path / "training", n=20, seed=2)
    for i in range(3):
        shutil.copy(images / f"{i}.png", training / f"copy{i}.png")
    extractor = load_extractor("random-conv")
    further = memorisation_of(extractor, training, **PASS)
    found = further.score(features_of_folder(images, extractor, **PASS), ImageFolder(images))
    assert (found["copies"], found["copied"]) == (3, 0.75)
    assert found["copied_se"] == pytest.approx(0.25)
    assert "23 with SHA-256" in further.about


def test_each_flag_of_the_command_line_is_a_column(
    images: Path, reference: Path, protocol: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["eval", str(images), f"--protocol={protocol}", f"--reference={reference}", "--workers", "0", f"--json={out}"]
    words += [f"--images={tmp_path / 'drawn'}", "--cmmd", str(clip_folder), "--training", str(images)]
    assert main(words) == 0
    (row,) = read_rows(out)
    assert (row["copies"], row["copied"]) == (N, 1.0)
    assert row["cmmd"] > 0
    assert read_facts(out)["evaluation"]["CMMD"].startswith(f"open_clip:{clip_folder.name}")
    cmmd, training = read_facts(out)["protocol"]["further"]
    assert cmmd == f"CMMD: {read_facts(out)['evaluation']['CMMD']}"
    assert training == f"training images: {read_facts(out)['evaluation']['training images']}"
    assert "exact copies" not in capsys.readouterr().out  # the terminal has the brief table
    for flag, says in (("--inception-score", "The Inception score is of the network inception-2015"), ("--sfid", "sFID is of")):
        assert main([*words, flag]) == 2
        assert says in capsys.readouterr().err


def test_a_protocol_of_inception_gives_its_score_by_its_splits(
    images: Path, reference: Path, protocol: Path, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        port, "WEIGHTS", dataclasses.replace(port.WEIGHTS, sha256=())
    )  # random weights in the place of the published
    text = protocol.read_text().replace("random-conv", "inception-2015").replace("torch-bicubic", "tf1")
    protocol.write_text(f'{text}inception_splits = "2 splits"\n')
    out = tmp_path / "out.json"
    words = ["eval", str(images), f"--protocol={protocol}", f"--reference={reference}", f"--weights={inception_weights}", "--sfid"]
    assert main([*words, "--workers", "0", f"--images={tmp_path / 'drawn'}", f"--json={out}"]) == 0
    (row,) = read_rows(out)
    assert row["inception_score"] > 1
    assert row["sfd"] > 0
    assert read_facts(out)["protocol"]["inception_splits"] == "2 splits"
    assert read_facts(out)["evaluation"]["sFD"].startswith("inception-2015/mixed_6#")
