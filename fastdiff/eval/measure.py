"""Any generator under a protocol: its images in a folder, one pass of features, all scores, the gates, the cost.

>>> instruments = open_instruments(Protocol.load("coco30k-dmd2"), reference="coco.npz", weights="inception-2015-12-05.pt")
>>> measured = measure(open_source("runs/student"), prompts, "images", instruments)
>>> measured.result.row(), measured.result.warnings, measured.protocol.label("FID")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore, reduce
from fastdiff.eval.cost import latency
from fastdiff.eval.evaluate import Result
from fastdiff.eval.frechet import frechet
from fastdiff.eval.generate import generate
from fastdiff.eval.generation import HEADER, Generation
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.instruments import Instruments
from fastdiff.eval.kept import read_row, write_row
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.sanity import enforce, feature_gates, file_gates, look_gates
from fastdiff.eval.scores import Scores, feature_scores
from fastdiff.eval.stats import Stats
from fastdiff.eval.subject import Subject, prompts_hash

SHOWN = 64
"""Images that are kept for a picture."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result and the protocol that it was really measured under."""

    result: Result
    protocol: Protocol
    kept: bool = False
    """It was read from the file of a finished row."""


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
        "scheduler": instruments.protocol.scheduler if subject.scheduler is None else subject.scheduler,
        "preprocess": instruments.extractor.preprocess.id,
        "patch_preprocess": "" if instruments.patch is None else instruments.protocol.patch_preprocess,
        "ddof": 1,
        "inception_splits": next((f.about for f in instruments.further if f.name == "Inception score"), ""),
        "further": tuple(f"{f.name}: {f.about}" for f in instruments.further if f.name != "Inception score"),
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
    for further in instruments.further:
        scores |= further.score(features, images, workers=workers, batch_size=batch_size)
    return scores


def _clip(scorer: ClipScore, images: ImageFolder, prompts: Sequence[str], batch_size: int) -> dict[str, float]:
    parts = torch.arange(len(images)).split(batch_size)
    cosines = torch.cat([scorer.cosines(images(part), [prompts[i] for i in part.tolist()]) for part in parts])
    score = reduce(cosines, scale=scorer.scale, clamp=scorer.clamp)
    return {"clip": score.value, "clip_se": score.se}
