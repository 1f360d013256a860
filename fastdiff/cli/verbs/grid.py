"""``fastdiff eval grid SOURCE ... --output GRID.png``: models under each other, the same prompt and noise a column.

Folders of images show their first ones: that they are of the same prompts and seed is for the user to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastdiff.cli.loading import device_of, quiet
from fastdiff.cli.options import check_outputs, parse
from fastdiff.errors import UserError


@dataclass(kw_only=True)
class Options:
    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DIR_OR_ID [DIR_OR_ID ...]")]
    """Pipelines or folders of generated images; a line of the grid each."""
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")]
    """Picture to write."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """One prompt a line; without it the captions of the bundled world."""
    columns: int = 10
    """Prompts."""
    steps: tuple[int, ...] = (25,)
    """Inference steps of pipelines that are no students of fastdiff, a line each."""
    guidance_scale: float = 3.0
    """Their guidance."""
    seed: int = 0
    """Of the noise: image i of every line has the same."""
    size: int = 96
    """Side of a picture in pixels."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def run(argv: Sequence[str]) -> int:
    """Draw, write."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="eval grid", description="Models under each other, the same noise a column.")
    check_outputs(output=chosen.output)
    if not chosen.sources or chosen.columns < 1:
        raise UserError("give one or more pipelines or folders of images, and at least one column.")
    from fastdiff.cli.protocols import subjects
    from fastdiff.data.fashion import random_captions
    from fastdiff.data.prompts import read_prompts
    from fastdiff.eval.report import grid_png
    from fastdiff.eval.subject import checked

    quiet()
    asked = random_captions(chosen.columns, chosen.seed) if chosen.prompts is None else read_prompts(chosen.prompts, None)  # type: ignore[arg-type]
    asked = asked[: chosen.columns]
    rows = {}
    for folder, subject in subjects(chosen.sources, chosen.steps, chosen.guidance_scale, device_of(chosen.device)):
        if subject.count is not None and subject.count < len(asked):
            raise UserError(f"{folder} has {subject.count} images: ask for as many --columns.")
        name = folder if subject.name in rows else subject.name
        try:
            rows[name] = checked(subject.draw(asked, seed=chosen.seed, indices=range(len(asked))), len(asked), name)
        except ValueError as error:
            raise UserError(str(error)) from error
    grid_png(chosen.output, rows, asked, columns=len(asked), size=chosen.size)
    print(f"picture  {chosen.output}")
    return 0
