"""Scores beside those of the feature pass, each for itself and only where it is asked for.

| column | what | needs |
|---|---|---|
| ``inception_score``, ``inception_score_sd`` | Inception score and its spread over the splits | the Inception extractor |
| ``sfd``, ``sfd_se`` | Frechet distance of spatial features (sFID) | the Inception extractor |
| ``cmmd`` | Gaussian-kernel distance of CLIP embeddings | a CLIP folder, a folder of reference images |
| ``copied``, ``copied_se``, ``copies`` | share of images near one training image alone, and those equal to one | training images |

>>> further = [inception_score_of(extractor, "10 splits"), memorisation_of(extractor, "photographs")]
>>> further[0].score(features, ImageFolder("images"), workers=2, batch_size=32)          # {"inception_score": ..., ...}
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.cmmd import cmmd
from fastdiff.eval.encoders import huggingface_clip, open_clip_model
from fastdiff.eval.extractor import INCEPTION, FeatureExtractor
from fastdiff.eval.frechet import frechet
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.inception import logits_of
from fastdiff.eval.inception_score import inception_score
from fastdiff.eval.memorisation import memorisation
from fastdiff.eval.reference import read_reference
from fastdiff.eval.scores import FeatureReference
from fastdiff.eval.stats import Stats

SPLITS = "10 splits"
"""Of an Inception score whose protocol names none; torch-fidelity's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Further:
    """A score of the features [N, d] of the protocol's extractor, or of the images themselves."""

    name: str
    about: str
    """What it was measured with; equal exactly when two values may be compared."""
    score: Callable[..., dict[str, float]]
    """(features, images, workers=..., batch_size=...) to columns."""


def inception_score_of(extractor: FeatureExtractor, splits: str) -> Further:
    """The Inception score of the pooled features, which the last layer turns into logits without its bias.

    Args:
        splits: ``10 splits``, shuffled with seed 2020 as torch-fidelity does, or ``splits of 5000`` in the order of the images as
            guided-diffusion does.

    ``UserError`` for another extractor, weights without a last layer, or splits that are neither.
    """
    found = re.fullmatch(r"(\d+) splits|splits of (\d+)", splits)
    if not found:
        raise UserError(f"inception_splits is {splits!r}: expected such as '10 splits' or 'splits of 5000'.")
    options: dict[str, Any] = {"splits": int(found[1])} if found[1] else {"split_size": int(found[2]), "seed": None}
    logits_of(extractor, torch.zeros(1, extractor.dim))  # says now what would fail after the images are drawn

    def score(features: Tensor, images: ImageFolder, **_: Any) -> dict[str, float]:
        value = inception_score(logits_of(extractor, features), **options)
        return {"inception_score": value.value, "inception_score_sd": value.sd}

    return Further(name="Inception score", about=splits, score=score)


def sfid_of(extractor: FeatureExtractor, reference: str | Path, own: FeatureExtractor, **passing: Any) -> Further:
    """The Frechet distance of the spatial features that ``extractor`` (layer ``mixed_6``) gives.

    Args:
        reference: a folder of images, extracted by ``own``, or ADM's npz with ``mu_s`` and ``sigma_s``.
        passing: ``workers`` and ``batch_size`` of the pass over the reference.
    """
    if Path(reference).is_dir():
        stats = Stats.of(features_of_folder(reference, own, **passing), extractor=extractor.id)
    else:
        try:
            stats = read_reference(reference, extractor=extractor.id).stats
        except UserError as error:
            raise UserError(
                f"sFID needs spatial features of the reference: {error} Give a folder of images, or an npz with mu_s and sigma_s."
            ) from error
    measured = FeatureReference.of(stats)

    def score(features: Tensor, images: ImageFolder, **passing: Any) -> dict[str, float]:
        spatial = features_of_folder(images, extractor, **passing)
        found = frechet(Stats.of(spatial, extractor=extractor.id), stats, features=spatial, root=measured.root)
        return {"sfd": found.value, "sfd_se": found.se}

    return Further(name="sFID" if extractor.published else "sFD", about=extractor.id, score=score)


def cmmd_of(folder: str | Path, reference: str | Path, **passing: Any) -> Further:
    """CMMD by the CLIP model in ``folder``, of open_clip or of transformers.

    ``UserError`` for a reference that is no folder of images: statistics have no embeddings of CLIP.
    """
    if not Path(reference).is_dir():
        raise UserError(f"CMMD needs the reference's images, and {reference} is statistics: give --reference a folder of images.")
    saved = (Path(folder) / "open_clip_config.json").is_file()
    extractor = open_clip_model(folder) if saved else huggingface_clip(folder)
    images = ImageFolder(reference)
    other = features_of_folder(images, extractor, **passing)

    def score(features: Tensor, images: ImageFolder, **passing: Any) -> dict[str, float]:
        return {"cmmd": cmmd(features_of_folder(images, extractor, **passing), other)}

    return Further(name="CMMD", about=f"{extractor.id}, {len(images)} images with SHA-256 {images.source}", score=score)


def memorisation_of(extractor: FeatureExtractor, training: str | Path, **passing: Any) -> Further:
    """Copies of the training images in the folder ``training``, in the features of ``extractor``."""
    images = ImageFolder(training)
    if len(images) < 2:
        raise UserError(f"{training} holds {len(images)} image: a second neighbour needs two training images or more.")
    other = features_of_folder(images, extractor, **passing)

    def score(features: Tensor, images: ImageFolder, **_: Any) -> dict[str, float]:
        found = memorisation(features, other)
        return {"copied": found.copied.value, "copied_se": found.copied.se, "copies": found.copies}

    return Further(name="training images", about=f"{len(images)} with SHA-256 {images.source}, {extractor.id}", score=score)


def check_inception(extractor: FeatureExtractor, score: str) -> None:
    """``UserError`` unless the extractor is the network that ``score`` is defined by."""
    if extractor.name != INCEPTION:
        raise UserError(
            f"{score} is of the network {INCEPTION}, and the protocol's extractor is {extractor.name}: its number would be called "
            "by a name that it has not. Leave it out, or take a protocol of that network."
        )
