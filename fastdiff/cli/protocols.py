"""``fastdiff eval --protocol``: any pipelines and folders of images under a protocol, with a reference of the user's."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.loading import device_of, quiet
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result
    from fastdiff.eval.protocol import Protocol
    from fastdiff.eval.subject import Subject


_OWN = {"fashion": (25, 3.0), "fashion-flow": (25, 2.0)}  # steps and guidance of bundled teachers, whose folders cannot say them


@dataclass(kw_only=True)
class Scoring:
    """How images are scored outside the bundled world."""

    protocol: str = ""
    """Score under this protocol: a bundled name, or a TOML file. Needs --reference and --prompts."""
    reference: Annotated[Path | None, tyro.conf.arg(metavar="FILE_OR_DIR")] = None
    """Reference statistics (`fastdiff eval stats`, or TTUR, clean-fid, EDM and ADM npz), or a folder of images."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights of the protocol's extractor; without it FASTDIFF_WEIGHTS and the cache are looked through."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the protocol's CLIP model, as open_clip saves it, for a CLIP score; without it there is none."""
    inception_score: bool = False
    """Inception score, by the protocol's splits or 10; of the Inception extractor only."""
    sfid: bool = False
    """Frechet distance of spatial features, a second pass; of the Inception extractor only."""
    cmmd: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """CMMD by the CLIP model in this folder, of open_clip or transformers; the reference must be a folder."""
    training: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the training images: the share of copies of them, by nearest neighbours."""
    images: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/images")
    """Where generated images are kept, a folder a row, and each finished row as NAME.row.json; a later run goes on there."""
    batch_size: int = 16
    """Images a call."""
    workers: int = 2
    """Processes that decode and resize."""


def subjects(
    sources: Sequence[str],
    steps: Sequence[int] | None,
    guidance_scale: float | None,
    device: str,
    *,
    resolution: int | None = None,
    scheduler: str = "",
) -> "list[tuple[str, Subject]]":
    """A subject for each row, with the name of its folder: students bare, others at each number of ``steps``.

    None leaves steps or guidance to the pipeline, whose call then gets none of it; bundled teachers have 25 and 3 or 2. All draw
    images of ``resolution``. The ``scheduler`` is that of the others: a student's is part of what was trained.
    """
    from fastdiff.eval.sources import image_folder, is_student, open_source

    found = []
    for source in sources:
        name = Path(source).name
        if image_folder(source):
            found.append((name, open_source(source, device=device)))
        elif is_student(source):
            found.append((name, open_source(source, resolution=resolution, device=device)))
        else:
            own_steps, own_scale = _OWN.get(source, (None, None))
            scale = own_scale if guidance_scale is None else guidance_scale
            for k in (own_steps,) if steps is None else steps:
                options: dict[str, Any] = {"steps": k, "guidance_scale": scale, "resolution": resolution, "scheduler": scheduler}
                found.append((_folder_name(name, k, scale), open_source(source, **options, device=device)))
    if len({name for name, _ in found}) < len(found):
        raise UserError(f"two of {', '.join(sources)} have one name, and their images would share a folder: rename one.")
    return found


def _folder_name(name: str, steps: int | None, guidance_scale: float | None) -> str:
    """``model-25-3``; what is left to the pipeline is ``own``, and a bare call has no ending."""
    if steps is None and guidance_scale is None:
        return name
    return f"{name}-{'own' if steps is None else steps}-{'own' if guidance_scale is None else f'{guidance_scale:g}'}"


def notes(results: "Sequence[Result]") -> dict[str, str]:
    """What the gates said of each model, as facts beside the scores."""
    return {f"note on {result.model}": " ".join(result.warnings) for result in results if result.warnings}


def protocol_rows(
    sources: Sequence[str],
    scoring: Scoring,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] | None,
    guidance_scale: float | None,
    num_images: int | None,
    seed: int,
    device: str,
) -> "tuple[list[Result], Protocol, dict[str, Any]]":
    """A result a row, the protocol with what was really done, and the facts that belong beside the scores.

    Raises:
        UserError: the protocol, its reference, weights or prompts are absent, or do not fit together.
    """
    from tqdm import tqdm

    from fastdiff.eval.instruments import Wanted, open_instruments
    from fastdiff.eval.measure import measure
    from fastdiff.eval.protocol import Protocol, comparable

    protocol = Protocol.load(scoring.protocol)
    reference, asked = _reference(protocol, scoring), _asked(protocol, prompts, num_images, seed)
    n = len(asked)
    quiet()
    scale = protocol.guidance_scale if protocol.guidance_scale is not None else guidance_scale
    wanted = Wanted(inception_score=scoring.inception_score, sfid=scoring.sfid, cmmd=scoring.cmmd, training=scoring.training)
    instruments = open_instruments(
        protocol, reference=reference, weights=scoring.weights, clip=scoring.clip, wanted=wanted, workers=scoring.workers
    )
    asked_steps, device = [protocol.steps] if protocol.steps else steps, device_of(device)
    rows = subjects(sources, asked_steps, scale, device, resolution=protocol.resolution, scheduler=protocol.scheduler)
    for _, subject in rows:  # before the first image is drawn
        subject.check_prompts(asked)
    results: list[Result] = []
    facts, done = {"seed": seed, **instruments.facts}, protocol
    with tqdm(total=len(rows) * n, unit="img", dynamic_ncols=True) as bar:
        for name, subject in rows:
            bar.set_description_str(subject.name)
            folder = Path(scoring.images) / name if subject.stored is None else next(s for s in sources if Path(s).name == name)
            try:
                found = measure(
                    subject,
                    asked,
                    folder,
                    instruments,
                    seed=seed,
                    batch_size=scoring.batch_size,
                    workers=scoring.workers,
                    progress=bar.update,
                    keep=(kept := Path(scoring.images) / f"{name}.row.json"),
                )
            except ValueError as error:  # a gate of the evaluation: what it says is about the images
                raise UserError(str(error)) from error
            if found.kept:
                bar.write(f"{subject.name}: its finished row is read from {kept}", file=sys.stderr)
            taken = {result.model for result in results}
            results.append(replace(found.result, model=name) if found.result.model in taken else found.result)
            if results[1:] and found.protocol.hash != done.hash:
                comparable(done, found.protocol)
            done = found.protocol
    return results, done, {**facts, **notes(results)}


def _reference(protocol: "Protocol", scoring: Scoring) -> Path:
    from fastdiff.data.fashion import ASSETS

    reference = scoring.reference
    if reference is None and (ASSETS / protocol.reference).is_file():
        reference = ASSETS / protocol.reference
    if reference is None:
        raise UserError(
            f"{protocol.name} measures against {protocol.reference!r}, which is not bundled: give --reference, a file or folder."
        )
    return reference


def _asked(protocol: "Protocol", prompts: Sequence[str], num_images: int | None, seed: int) -> list[str]:
    from fastdiff.data.fashion import random_captions

    n = protocol.n if num_images is None else num_images
    if not prompts and protocol.extractor == "fashion":
        prompts = random_captions(n, seed)
    if not prompts and protocol.prompts.startswith("unconditional"):
        prompts = [""] * n
    if not prompts:
        raise UserError(f"{protocol.name} draws {protocol.prompts!r}: give them with --prompts, a text file with one a line.")
    if n < 2:
        raise UserError(f"--num-images is {n}; it must be at least 2.")
    if len(prompts) < n:
        raise UserError(
            f"{protocol.name} is of {n} images and the prompts file has {len(prompts)} lines: give as many, or --num-images."
        )
    return list(prompts[:n])
