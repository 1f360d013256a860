"""``fastdiff eval sweep TEACHER [STUDENT ...]``: the teacher over steps and guidance, its students beside it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.evaluate import Options as Chosen
from fastdiff.cli.evaluate import check, of_the_world
from fastdiff.cli.loading import open_pipeline
from fastdiff.cli.options import check_outputs, parse
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result


@dataclass(kw_only=True)
class Options:
    pipelines: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEACHER [STUDENT ...]")]
    """A teacher of the bundled world, and students of it."""
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")]
    """The surface; the rows go beside it, with the ending .json."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 25)
    """Inference steps."""
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales; 1 is off."""
    num_images: int = 500
    """Images a cell: a distance has a bias of about c / n, the same in all cells."""
    seed: int = 0
    """Of prompts and noise, the same in all cells."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def run(argv: Sequence[str]) -> int:
    """Score every cell, write the rows and the picture."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="eval sweep", description="FD of a teacher over steps and guidance, and of its students.")
    check_outputs(output=chosen.output)
    students, teacher = check(Chosen(pipelines=chosen.pipelines))
    if teacher is None:
        raise UserError("a sweep is of a teacher; give its folder, hub id, or `fashion`, and then its students.")
    if not chosen.steps or not chosen.guidance or min(chosen.steps) < 1 or chosen.num_images < 2:
        raise UserError("a sweep needs --steps of 1 or more, --guidance, and --num-images of 2 or more.")
    opened = open_pipeline(teacher, chosen.device)
    pipelines = {name: open_pipeline(folder, chosen.device) for name, folder in students.items()}
    if not all(map(of_the_world, [opened, *pipelines.values()])):
        raise UserError(
            f"{teacher} is not of the bundled world, whose scores a sweep draws: use `fastdiff eval --protocol` a cell."
        )
    from fastdiff.eval.protocol import Protocol
    from fastdiff.eval.report import environment, rows_json, surface_png

    rows, beside = _scored(opened, pipelines, chosen)
    protocol = Protocol.load("fashion").replace(n=chosen.num_images, seed=chosen.seed)
    command = shlex.join(["fastdiff", "eval", "sweep", *argv])
    rows_json(
        chosen.output.with_suffix(".json"), [*rows, *beside], protocol=protocol.record, command=command, environment=environment()
    )
    surface_png(chosen.output, [row.row() for row in rows], [row.row() for row in beside])
    print(f"surface  {chosen.output}\nrows     {chosen.output.with_suffix('.json')}")
    return 0


def _scored(teacher: Any, students: dict[str, Any], chosen: Options) -> "tuple[list[Result], list[Result]]":
    from tqdm import tqdm

    from fastdiff.data.fashion import random_captions
    from fastdiff.eval.evaluate import evaluate
    from fastdiff.eval.fashion import FashionMetrics
    from fastdiff.eval.pipeline import pipeline_subject

    metric, prompts = FashionMetrics.load(), random_captions(chosen.num_images, chosen.seed)
    cells = [(k, s) for s in chosen.guidance for k in chosen.steps]
    subjects = [pipeline_subject(f"teacher, guidance {s:g}", teacher, steps=k, guidance_scale=s) for k, s in cells]
    subjects += [pipeline_subject(f"student {name}", pipeline) for name, pipeline in students.items()]
    found = []
    for subject in tqdm(subjects, unit="cell", dynamic_ncols=True):
        found.append(evaluate(subject, prompts, metric, seed=chosen.seed, repeats=3))
    return found[: len(cells)], found[len(cells) :]
