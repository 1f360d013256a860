"""What a protocol's scores are measured with: its extractor, its reference, its CLIP model, and what was asked for besides.

>>> instruments = open_instruments(Protocol.load("clean"), reference="photographs", wanted=Wanted(training="photographs"))
>>> instruments.label, instruments.facts
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import EXTRACTORS, load_extractor
from fastdiff.eval.frechet import covariance_factor
from fastdiff.eval.further import SPLITS, Further, check_inception, cmmd_of, inception_score_of, memorisation_of, sfid_of
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.inception import has_logits
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.reference import read_reference
from fastdiff.eval.scores import FeatureReference
from fastdiff.eval.stats import Stats
from fastdiff.eval.weights import sha256, state_digest


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Scores beside those of the feature pass (``further``)."""

    inception_score: bool = False
    """Refuse a protocol whose extractor cannot give it; where a protocol names its splits it is given if it can be."""
    sfid: bool = False
    cmmd: str | Path | None = None
    """Folder of the CLIP model."""
    training: str | Path | None = None
    """Folder of the training images, for copies of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Instruments:
    """What a protocol's scores are measured with."""

    protocol: Protocol
    extractor: FeatureExtractor
    reference: FeatureReference
    reference_sha256: str = ""
    """Of a folder's images (``source_hash``), which statistics of it carry too, else of the file; part of what is reported."""
    patch: "Instruments | None" = None
    """Of a second Frechet distance, of full-resolution patches, where the protocol has one and the reference is images."""
    clip: ClipScore | None = None
    further: tuple[Further, ...] = ()

    @property
    def facts(self) -> dict[str, str | float]:
        """The conventions that belong beside the scores."""
        clip = {} if self.clip is None else {f"CLIP score: {key}": value for key, value in self.clip.conventions.items()}
        return {"score": self.label, **clip, **{further.name: further.about for further in self.further}}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides a score besides the images: protocol, networks and reference."""
        clip = None if self.clip is None else {**self.clip.conventions, "weights": state_digest(self.clip.model)}
        patch = None if self.patch is None else self.patch.identity
        own = {"protocol": self.protocol.hash, "extractor": self.extractor.id, "reference": self.reference_sha256}
        return {
            **own,
            "features": self.reference.features is not None,
            "patch": patch,
            "clip": clip,
            **{f.name: f.about for f in self.further},
        }

    @property
    def label(self) -> str:
        """What its Frechet distance is called: ``FID[clean]`` or ``FD[name]``."""
        return self.extractor.label


def _clip_score(protocol: Protocol, folder: str | Path) -> ClipScore:
    clamp = {"": "per_sample", "per_sample": "per_sample", "mean": "mean", "none": "none"}[protocol.clip_clamp]
    scale = 100.0 if protocol.clip_scale is None else protocol.clip_scale
    try:
        return ClipScore(folder, prefix=protocol.clip_prefix, scale=scale, clamp=clamp, prepare="crop")  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error


def open_extractor(protocol: Protocol, *, weights: str | Path | None = None, reference: bool = False) -> FeatureExtractor:
    """The protocol's extractor with its preprocess, or that of its reference images.

    A protocol's ``:truncate`` is not repeated: generated images are files of rounded levels, and what is reported says so.

    Args:
        weights: a file or folder of the extractor's weights, where it takes one.

    Raises:
        UserError: the extractor is unknown, its weights are absent, or it takes none and some were given.
    """
    name = protocol.extractor
    if name not in EXTRACTORS:
        raise UserError(f"{protocol.name} asks for the extractor {name!r}: expected one of {', '.join(EXTRACTORS)}.")
    takes = inspect.signature(EXTRACTORS[name]).parameters
    chosen = _preprocess(protocol, reference=reference)
    options = {key: value for key, value in {"preprocess": chosen, "layer": protocol.layer}.items() if key in takes}
    if weights is not None:
        key = next((key for key in ("weights", "folder", "model") if key in takes), "")
        if not key:
            raise UserError(f"the extractor {name} has its weights from nowhere: --weights {weights} would change nothing.")
        options[key] = str(weights)
    extractor = load_extractor(name, **options)
    if extractor.preprocess.id != Preprocess.parse(chosen).id:
        raise UserError(
            f"{protocol.name} prepares images by {chosen}, and the extractor {name} does it by {extractor.preprocess.id} alone: "
            "its scores would be of another protocol. Name that one in the protocol."
        )
    return extractor


def _preprocess(protocol: Protocol, *, reference: bool) -> str:
    chosen = protocol.reference_preprocess if reference and protocol.reference_preprocess else protocol.preprocess
    return chosen.removesuffix(":truncate")  # images are read from files, which hold rounded levels already


def open_instruments(
    protocol: Protocol,
    *,
    reference: str | Path,
    weights: str | Path | None = None,
    clip: str | Path | None = None,
    wanted: Wanted | None = None,
    workers: int = 2,
    batch_size: int = 32,
) -> Instruments:
    """The extractor and the reference of a protocol.

    Args:
        reference: statistics in any form that ``read_reference`` takes, or a folder of images; with a folder come the scores
            that need the reference's own features, and class names where its subfolders are classes.
        weights: of the extractor.
        clip: a folder of the protocol's CLIP model, for a CLIP score by its prefix, scale and clamp; its images are cropped as CLIP
            does. (DMD2 puts the prefix in at token level; here it is part of the text.)

    Raises:
        UserError: an extractor or reference that is not there, a reference of another extractor, or a wanted score that these
            cannot give.
    """
    passing: dict[str, Any] = {"workers": workers, "batch_size": batch_size}
    extractor, scorer = open_extractor(protocol, weights=weights), None if clip is None else _clip_score(protocol, clip)
    further = _further(protocol, extractor, reference, weights, wanted or Wanted(), passing)
    patch = None
    if Path(reference).is_dir():
        measured, digest = _of_folder(protocol, extractor, reference, weights, passing)
        if protocol.patch_preprocess:
            patch = open_instruments(
                _patches(protocol), reference=reference, weights=weights, workers=workers, batch_size=batch_size
            )
    else:
        measured, digest = _of_file(protocol, extractor, reference)
    return Instruments(
        protocol=protocol,
        extractor=extractor,
        reference=measured,
        reference_sha256=digest,
        patch=patch,
        clip=scorer,
        further=further,
    )


def _of_folder(
    protocol: Protocol, extractor: FeatureExtractor, reference: str | Path, weights: str | Path | None, passing: dict[str, Any]
) -> tuple[FeatureReference, str]:
    folder = ImageFolder(reference)
    if len(folder) < 2:
        raise UserError(f"{reference} holds {len(folder)} image: a reference needs two or more.")
    features = features_of_folder(folder, open_extractor(protocol, weights=weights, reference=True), **passing)
    groups = [] if folder.labels is None else [folder.classes[i] for i in folder.labels.tolist()]
    stats = Stats.of(features, extractor=extractor.id)
    return FeatureReference.of(stats, features=features, groups=groups), folder.source


def _of_file(protocol: Protocol, extractor: FeatureExtractor, reference: str | Path) -> tuple[FeatureReference, str]:
    found = read_reference(reference, extractor=extractor.id)
    root = found.sqrt_sigma if found.sqrt_sigma is not None else covariance_factor(found.stats)
    same = found.header.get("preprocess") == Preprocess.parse(_preprocess(protocol, reference=True)).id
    digest = (found.header.get("source") if same else "") or sha256(Path(reference))
    return FeatureReference(stats=found.stats, root=root), digest


def _further(
    protocol: Protocol,
    extractor: FeatureExtractor,
    reference: str | Path,
    weights: str | Path | None,
    wanted: Wanted,
    passing: dict[str, Any],
) -> tuple[Further, ...]:
    found = []
    if wanted.inception_score:
        check_inception(extractor, "The Inception score")
    if wanted.inception_score or (protocol.inception_splits and has_logits(extractor)):
        found.append(inception_score_of(extractor, protocol.inception_splits or SPLITS))
    if wanted.sfid:
        check_inception(extractor, "sFID")
        spatial = protocol.replace(layer="mixed_6")
        own = open_extractor(spatial, weights=weights, reference=True)
        found.append(sfid_of(open_extractor(spatial, weights=weights), reference, own, **passing))
    if wanted.cmmd is not None:
        found.append(cmmd_of(wanted.cmmd, reference, **passing))
    if wanted.training is not None:
        own = open_extractor(protocol, weights=weights, reference=True)
        found.append(memorisation_of(own, wanted.training, **passing))
    return tuple(found)


def _patches(protocol: Protocol) -> Protocol:
    """The protocol of the second distance: patches of generated images and reference alike."""
    return protocol.replace(preprocess=protocol.patch_preprocess, reference_preprocess="", patch_preprocess="", inception_splits="")
