"""Any generator under a protocol: its images in a folder, one pass of features, all scores, the gates, the cost.

>>> instruments = open_instruments(Protocol.load("coco30k-dmd2"), reference="coco.npz", weights="inception-2015-12-05.pt")
>>> measured = measure(open_source("runs/student"), prompts, "images", instruments)
>>> measured.result.row(), measured.result.warnings, measured.protocol.label("FID")
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.errors import UserError
from fastdiff.eval.cost import latency
from fastdiff.eval.evaluate import Result
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import EXTRACTORS, load_extractor
from fastdiff.eval.frechet import covariance_factor
from fastdiff.eval.generate import generate
from fastdiff.eval.generation import Generation
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.reference import read_reference
from fastdiff.eval.sanity import enforce, feature_gates, file_gates, image_gates
from fastdiff.eval.scores import FeatureReference, feature_scores
from fastdiff.eval.stats import Stats
from fastdiff.eval.subject import Subject, prompts_hash

SHOWN = 64
"""Images that are kept for a picture and looked at by the gates on pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Instruments:
    """What a protocol's scores are measured with."""

    protocol: Protocol
    extractor: FeatureExtractor
    reference: FeatureReference

    @property
    def label(self) -> str:
        """What its Frechet distance is called: ``FID[clean]`` or ``FD[name]``."""
        return self.extractor.label


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result and the protocol that it was really measured under."""

    result: Result
    protocol: Protocol


def open_extractor(protocol: Protocol, *, weights: str | Path | None = None, reference: bool = False) -> FeatureExtractor:
    """The protocol's extractor with its preprocess, or that of its reference images.

    Args:
        weights: a file or folder of the extractor's weights, where it takes one.

    Raises:
        UserError: the extractor is unknown, its weights are absent, or it takes none and some were given.
    """
    name = protocol.extractor
    if name not in EXTRACTORS:
        raise UserError(f"{protocol.name} asks for the extractor {name!r}: expected one of {', '.join(EXTRACTORS)}.")
    takes = inspect.signature(EXTRACTORS[name]).parameters
    chosen = protocol.reference_preprocess if reference and protocol.reference_preprocess else protocol.preprocess
    options = {key: value for key, value in {"preprocess": chosen, "layer": protocol.layer}.items() if key in takes}
    if weights is not None:
        key = next((key for key in ("weights", "folder", "model") if key in takes), "")
        if not key:
            raise UserError(f"the extractor {name} has its weights from nowhere: --weights {weights} would change nothing.")
        options[key] = str(weights)
    return load_extractor(name, **options)


def open_instruments(
    protocol: Protocol, *, reference: str | Path, weights: str | Path | None = None, workers: int = 2, batch_size: int = 32
) -> Instruments:
    """The extractor and the reference of a protocol.

    Args:
        reference: statistics in any form that ``read_reference`` takes, or a folder of images; with a folder come the scores
            that need the reference's own features, and class names where its subfolders are classes.
        weights: of the extractor.

    Raises:
        UserError: an extractor or reference that is not there, or a reference of another extractor.
    """
    extractor = open_extractor(protocol, weights=weights)
    if Path(reference).is_dir():
        folder = ImageFolder(reference)
        own = open_extractor(protocol, weights=weights, reference=True)
        features = features_of_folder(folder, own, workers=workers, batch_size=batch_size)
        groups = [] if folder.labels is None else [folder.classes[i] for i in folder.labels.tolist()]
        stats = Stats.of(features, extractor=extractor.id)
        return Instruments(
            protocol=protocol, extractor=extractor, reference=FeatureReference.of(stats, features=features, groups=groups)
        )
    found = read_reference(reference, extractor=extractor.id)
    root = found.sqrt_sigma if found.sqrt_sigma is not None else covariance_factor(found.stats)
    return Instruments(protocol=protocol, extractor=extractor, reference=FeatureReference(stats=found.stats, root=root))


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
) -> Measured:
    """Draw what ``folder`` misses, extract, score.

    Args:
        prompts: of image i, ``prompts[i]``; as many as the protocol's n.
        folder: where the images are, or will be; an interrupted run goes on there.
        groups: the class of each image, for a distance of each class.
        repeats: timed single images; none for images that are there already.
        progress: called with the number of images just drawn.

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
    features = features_of_folder(images, instruments.extractor, workers=workers, batch_size=batch_size)
    shown = images(torch.arange(min(SHOWN, len(images))))
    findings = [*image_gates(shown), *file_gates(images.files), *feature_gates(features)]
    scores = feature_scores(features, instruments.reference, extractor=instruments.extractor.id, groups=groups)
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
        warnings=tuple(enforce(findings)),
        steps=subject.steps,
        guidance_scale=subject.guidance_scale,
        images=shown,
        prompts=list(prompts[: len(shown)]),
        **cost,
    )
    real = instruments.protocol.replace(n=len(images), seed=seed, prompts_sha256=prompts_hash(prompts))
    return Measured(result=result, protocol=real)
