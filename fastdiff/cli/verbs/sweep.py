"""``fastdiff eval sweep TEACHER [STUDENT ...]``: the teacher over steps and guidance, its students beside it.

The bundled world is scored in memory; anything else under ``--protocol``, with a folder of images a cell.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.evaluate import Options as Chosen
from fastdiff.cli.evaluate import check, of_the_world, read_prompts_of
from fastdiff.cli.loading import open_pipeline
from fastdiff.cli.options import check_outputs, parse
from fastdiff.cli.protocols import Scoring, protocol_rows
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result
    from fastdiff.eval.protocol import Protocol

_IMAGES = 500


@dataclass(kw_only=True)
class Options:
    pipelines: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEACHER [STUDENT ...]")]
    """A teacher, and students of it."""
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")]
    """The surface; the rows go beside it, with the ending .json."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 25)
    """Inference steps."""
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales; 1 is off; none at all for a pipeline that takes none."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """One prompt a line, under --protocol."""
    num_images: int | None = None
    """Images a cell, by default 500, or the protocol's own: a distance has a bias of about c / n, the same in all cells."""
    seed: int = 0
    """Of prompts and noise, the same in all cells."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def run(argv: Sequence[str]) -> int:
    """Score every cell, write the rows and the picture."""

    def options(general: Options, scoring: Scoring) -> tuple[Options, Scoring]:
        return general, scoring

    about = "FD of a teacher over steps and guidance, and of its students."
    chosen, scoring = parse(options, argv, command="eval sweep", description=about)
    check_outputs(output=chosen.output)
    students, teacher = check(Chosen(pipelines=chosen.pipelines))
    if teacher is None:
        raise UserError("a sweep is of a teacher; give its folder, hub id, or `fashion`, and then its students.")
    if not chosen.steps or min(chosen.steps) < 1 or (chosen.num_images or 2) < 2:
        raise UserError("a sweep needs --steps of 1 or more, and --num-images of 2 or more.")
    rows, beside, protocol = (_by_protocol if scoring.protocol else _of_the_world)(teacher, students, chosen, scoring)
    from fastdiff.eval.report import environment, rows_json, surface_png

    command = shlex.join(["fastdiff", "eval", "sweep", *argv])
    rows_json(
        chosen.output.with_suffix(".json"), [*rows, *beside], protocol=protocol.record, command=command, environment=environment()
    )
    surface_png(chosen.output, [row.row() for row in rows], [row.row() for row in beside])
    print(f"surface  {chosen.output}\nrows     {chosen.output.with_suffix('.json')}")
    return 0


def _by_protocol(
    teacher: str, students: dict[str, str], chosen: Options, scoring: Scoring
) -> "tuple[list[Result], list[Result], Protocol]":
    from fastdiff.eval.protocol import Protocol, comparable

    fixed = Protocol.load(scoring.protocol)
    if fixed.steps is not None or fixed.guidance_scale is not None:
        raise UserError(f"{fixed.name} fixes steps or guidance, and a sweep is over them: take a protocol that leaves both open.")
    given: dict[str, Any] = {"num_images": chosen.num_images, "seed": chosen.seed, "device": chosen.device}
    lines: list[tuple[list[str], tuple[int, ...] | None, float | None]]
    lines = [([teacher], chosen.steps, scale) for scale in chosen.guidance or (None,)]
    lines += [(list(students.values()), None, None)] if students else []
    found, protocols = [], []
    for sources, steps, scale in lines:
        asked = read_prompts_of(chosen.prompts) or []
        rows, protocol, _ = protocol_rows(sources, scoring, asked, steps=steps, guidance_scale=scale, **given)
        found.append(rows)
        protocols.append(protocol)
        comparable(protocols[0], protocol)
    cells = found[: len(chosen.guidance or (None,))]
    return [row for rows in cells for row in rows], [row for rows in found[len(cells) :] for row in rows], protocols[0]


def _of_the_world(
    teacher: str, students: dict[str, str], chosen: Options, scoring: Scoring
) -> "tuple[list[Result], list[Result], Protocol]":
    from fastdiff.eval.protocol import Protocol

    opened = open_pipeline(teacher, chosen.device)
    pipelines = {name: open_pipeline(folder, chosen.device) for name, folder in students.items()}
    if not all(map(of_the_world, [opened, *pipelines.values()])):
        raise UserError(f"{teacher} is not of the bundled world: give --protocol and what it needs (--reference, --prompts).")
    if not chosen.guidance or chosen.prompts is not None:
        raise UserError("the bundled world is swept over --guidance, and draws its own captions: leave --prompts out.")
    n = chosen.num_images or _IMAGES
    rows, beside = _scored(opened, pipelines, n, chosen)
    return rows, beside, Protocol.load("fashion").replace(n=n, seed=chosen.seed)


def _scored(teacher: Any, students: dict[str, Any], n: int, chosen: Options) -> "tuple[list[Result], list[Result]]":
    from tqdm import tqdm

    from fastdiff.data.fashion import random_captions
    from fastdiff.eval.evaluate import evaluate
    from fastdiff.eval.fashion import FashionMetrics
    from fastdiff.eval.pipeline import pipeline_subject

    metric, prompts = FashionMetrics.load(), random_captions(n, chosen.seed)
    cells = [(k, s) for s in chosen.guidance for k in chosen.steps]
    subjects = [pipeline_subject(f"teacher, guidance {s:g}", teacher, steps=k, guidance_scale=s) for k, s in cells]
    subjects += [pipeline_subject(f"student {name}", pipeline) for name, pipeline in students.items()]
    found = []
    for subject in tqdm(subjects, unit="cell", dynamic_ncols=True):
        found.append(evaluate(subject, prompts, metric, seed=chosen.seed, repeats=3))
    return found[: len(cells)], found[len(cells) :]
