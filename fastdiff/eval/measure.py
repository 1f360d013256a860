"""Any generator under a protocol: its images in a folder, one pass of features, all scores, the gates, the cost.

>>> instruments = open_instruments(Protocol.load("coco30k-dmd2"), reference="coco.npz", weights="inception-2015-12-05.pt")
>>> measured = measure(open_source("runs/student"), prompts, "images", instruments)
>>> measured.result.row(), measured.result.warnings, measured.protocol.label("FID")
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore, reduce
from fastdiff.eval.cost import latency
from fastdiff.eval.evaluate import Result
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import EXTRACTORS, load_extractor
from fastdiff.eval.frechet import covariance_factor, frechet
from fastdiff.eval.generate import generate
from fastdiff.eval.generation import HEADER, Generation
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.kept import read_row, write_row
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.reference import read_reference
from fastdiff.eval.sanity import enforce, feature_gates, file_gates, look_gates
from fastdiff.eval.scores import FeatureReference, Scores, feature_scores
from fastdiff.eval.stats import Stats
from fastdiff.eval.subject import Subject, prompts_hash
from fastdiff.eval.weights import sha256, state_digest

SHOWN = 64
"""Images that are kept for a picture."""


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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides a score besides the images: protocol, networks and reference."""
        clip = None if self.clip is None else {**self.clip.conventions, "weights": state_digest(self.clip.model)}
        patch = None if self.patch is None else self.patch.identity
        own = {"protocol": self.protocol.hash, "extractor": self.extractor.id, "reference": self.reference_sha256}
        return {**own, "features": self.reference.features is not None, "patch": patch, "clip": clip}

    @property
    def label(self) -> str:
        """What its Frechet distance is called: ``FID[clean]`` or ``FD[name]``."""
        return self.extractor.label


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result and the protocol that it was really measured under."""

    result: Result
    protocol: Protocol
    kept: bool = False
    """It was read from the file of a finished row."""


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
        UserError: an extractor or reference that is not there, or a reference of another extractor.
    """
    extractor, scorer = open_extractor(protocol, weights=weights), None if clip is None else _clip_score(protocol, clip)
    if Path(reference).is_dir():
        folder = ImageFolder(reference)
        own = open_extractor(protocol, weights=weights, reference=True)
        if len(folder) < 2:
            raise UserError(f"{reference} holds {len(folder)} image: a reference needs two or more.")
        features = features_of_folder(folder, own, workers=workers, batch_size=batch_size)
        groups = [] if folder.labels is None else [folder.classes[i] for i in folder.labels.tolist()]
        stats = Stats.of(features, extractor=extractor.id)
        patch = None
        if protocol.patch_preprocess:
            options: dict[str, Any] = {"weights": weights, "workers": workers, "batch_size": batch_size}
            patch = open_instruments(_patches(protocol), reference=reference, **options)
        measured = FeatureReference.of(stats, features=features, groups=groups)
        return Instruments(
            protocol=protocol,
            extractor=extractor,
            reference=measured,
            reference_sha256=folder.source,
            patch=patch,
            clip=scorer,
        )
    found = read_reference(reference, extractor=extractor.id)
    root = found.sqrt_sigma if found.sqrt_sigma is not None else covariance_factor(found.stats)
    measured = FeatureReference(stats=found.stats, root=root)
    same = found.header.get("preprocess") == Preprocess.parse(_preprocess(protocol, reference=True)).id
    digest = (found.header.get("source") if same else "") or sha256(Path(reference))
    return Instruments(protocol=protocol, extractor=extractor, reference=measured, reference_sha256=digest, clip=scorer)


def _patches(protocol: Protocol) -> Protocol:
    """The protocol of the second distance: patches of generated images and reference alike."""
    return protocol.replace(preprocess=protocol.patch_preprocess, reference_preprocess="", patch_preprocess="")


def measure(
    subject: Subject,
    prompts: Sequence[str],
    folder: str | Path,
    instruments: Instruments,
    *,
    seed: int = 0,
    groups: Sequence[str] = (),
    batch_size: int = 16,
    workers: int = 2,
    repeats: int = 5,
    progress: Callable[[int], None] | None = None,
    keep: str | Path | None = None,
) -> Measured:
    """Draw what ``folder`` misses, extract, score.

    Args:
        prompts: of image i, ``prompts[i]``; as many as the protocol's n.
        folder: where the images are, or will be; an interrupted run goes on there.
        groups: the class of each image, for a distance of each class.
        repeats: timed single images; none for images that are there already.
        progress: called with the number of images just drawn.
        keep: a file of the finished row (``kept``): written, and read in place of a measurement that it is of.

    Raises:
        UserError: the folder holds other images, or not as many as there are prompts.
        ValueError: a gate refuses: images that are not finite, or fewer than two.
    """
    subject.check_prompts(prompts)
    if subject.stored is None:
        generate(subject, prompts, folder, seed=seed, batch_size=batch_size, progress=progress)
    images = ImageFolder(folder)
    if len(images) != len(prompts):
        raise UserError(f"{folder} holds {len(images)} images, and the evaluation is of {len(prompts)}: give as many prompts.")
    shown = images(torch.arange(min(SHOWN, len(images))))
    key = {} if keep is None else _key(subject, prompts, images, instruments, groups, repeats)
    if keep is not None and (kept := read_row(keep, key, images=shown, prompts=list(prompts[: len(shown)]))):
        return Measured(result=kept[0], protocol=kept[1], kept=True)
    seen: list[Tensor] = []
    features = features_of_folder(images, instruments.extractor, workers=workers, batch_size=batch_size, looked=seen.append)
    findings = [*look_gates(torch.cat(seen)), *file_gates(images.files), *feature_gates(features)]
    warnings = tuple(enforce(findings))
    scores = _scores(features, images, prompts, instruments, groups, workers=workers, batch_size=batch_size)
    cost = dict(Generation.open(folder).known if subject.stored is None else subject.known)
    if subject.stored is None and repeats:
        time = latency(lambda: subject.draw(prompts[:1], seed=seed, indices=[0]), repeats=repeats, device=subject.device)
        cost |= {"latency_ms_p50": time.p50_ms, "latency_ms_p95": time.p95_ms}
    result = Result(
        model=subject.name,
        n=len(images),
        metrics=scores.values,
        groups=scores.groups,
        features=scores.features,
        warnings=warnings,
        steps=subject.steps,
        guidance_scale=subject.guidance_scale,
        images=shown,
        prompts=list(prompts[: len(shown)]),
        **cost,
    )
    real = instruments.protocol.replace(
        n=len(images), prompts_sha256=prompts_hash(prompts), **_done(instruments, subject, folder, seed, shown)
    )
    if keep is not None:
        write_row(keep, key, result, real)
    return Measured(result=result, protocol=real)


def _key(
    subject: Subject, prompts: Sequence[str], images: ImageFolder, instruments: Instruments, groups: Sequence[str], repeats: int
) -> dict[str, Any]:
    """All that decides a row."""
    made = Generation.open(images.path).settings if (images.path / HEADER).is_file() else None
    timed = None if subject.stored is not None else {"device": str(subject.device), "repeats": repeats}
    return {
        "model": subject.name,
        "images": images.source,
        "generation": made,
        "cost": timed,
        "prompts": prompts_hash(prompts),
        "groups": prompts_hash(groups),
        "instruments": instruments.identity,
    }


def _done(instruments: Instruments, subject: Subject, folder: str | Path, seed: int, shown: Tensor) -> dict[str, Any]:
    """The choices of the protocol as they were really made; those of images of unknown origin are open."""
    made: dict[str, Any] = {"seed": seed, "noise": "image", "noise_batch": None}
    if subject.stored is not None:
        known = (Path(folder) / HEADER).is_file()
        made["seed"] = Generation.open(folder).settings["seed"] if known else None
    side = shown.shape[-1] if shown.shape[-1] == shown.shape[-2] else None
    scorer = instruments.clip
    clip = ("", "", None, "") if scorer is None else (scorer.name, scorer.prefix, scorer.scale, scorer.clamp)
    return {
        **made,
        **dict(zip(("clip_model", "clip_prefix", "clip_scale", "clip_clamp"), clip, strict=True)),
        "resolution": side,
        "output_range": "files of 8 bits, rounded",
        "scheduler": "",
        "preprocess": instruments.extractor.preprocess.id,
        "patch_preprocess": "" if instruments.patch is None else instruments.protocol.patch_preprocess,
        "ddof": 1,
        "inception_splits": "",
        "reference_sha256": instruments.reference_sha256,
    }


def _scores(
    features: Tensor,
    images: ImageFolder,
    prompts: Sequence[str],
    instruments: Instruments,
    groups: Sequence[str],
    *,
    workers: int,
    batch_size: int,
) -> Scores:
    k = instruments.protocol.neighbours or 5
    scores = feature_scores(features, instruments.reference, extractor=instruments.extractor.id, groups=groups, k=k)
    if instruments.patch is not None:
        second = instruments.patch
        patches = features_of_folder(images, second.extractor, workers=workers, batch_size=batch_size)
        found = frechet(
            Stats.of(patches, extractor=second.extractor.id), second.reference.stats, features=patches, root=second.reference.root
        )
        scores |= {"fd_patch": found.value, "fd_patch_se": found.se}
    if instruments.clip is not None:
        scores |= _clip(instruments.clip, images, prompts, batch_size)
    return scores


def _clip(scorer: ClipScore, images: ImageFolder, prompts: Sequence[str], batch_size: int) -> dict[str, float]:
    parts = torch.arange(len(images)).split(batch_size)
    cosines = torch.cat([scorer.cosines(images(part), [prompts[i] for i in part.tolist()]) for part in parts])
    score = reduce(cosines, scale=scorer.scale, clamp=scorer.clamp)
    return {"clip": score.value, "clip_se": score.se}
