"""``fastdiff eval bench SOURCE ...``: what an image costs."""

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
    """Folders written by fastdiff or diffusers, hub ids, or a bundled teacher, `fashion` or `fashion-flow`."""
    steps: tuple[int, ...] = ()
    """Inference steps, a row each; by default what a bare call takes."""
    guidance_scale: float | None = None
    """Guidance of all rows; by default that of a bare call."""
    prompt: str = "a red boot on a white background"
    """What is drawn."""
    num_images: int = 32
    """Images of the throughput."""
    batch_size: int = 8
    """Images a call of the throughput; the latency is that of a single image."""
    repeats: int = 10
    """Timed single images."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the rows as JSON."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def run(argv: Sequence[str]) -> int:
    """Draw, time, print."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="eval bench", description="Network calls, latency, images a second, memory, size.")
    check_outputs(json=chosen.json)
    if not chosen.sources:
        raise UserError("nothing to measure; give one or more folders, hub ids, or `fashion`.")
    for name in ("num_images", "batch_size", "repeats"):
        if getattr(chosen, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(chosen, name)}; it must be at least 1.")
    quiet()
    from fastdiff.eval.evaluate import evaluate
    from fastdiff.eval.report import environment, rows_json, table
    from fastdiff.eval.sources import open_source

    device, results = device_of(chosen.device), []
    for source in chosen.sources:
        for steps in chosen.steps or (None,):
            subject = open_source(source, steps=steps, guidance_scale=chosen.guidance_scale, device=device)
            if subject.generate is None:
                raise UserError(f"{source} is a folder of images, which cost nothing to draw; give a pipeline.")
            prompts = [chosen.prompt] * chosen.num_images
            drawn = evaluate(subject, prompts, lambda images, captions: {}, batch_size=chosen.batch_size, repeats=chosen.repeats)
            results.append(drawn)
    print(table([result.row() for result in results]))
    if chosen.json:
        rows_json(chosen.json, results, environment=environment())
    return 0
