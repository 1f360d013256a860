"""The options of a run, as ``distill`` starts it and ``plan`` looks at it beforehand.

They are the fields of dataclasses, flat: the command's own, the engine's ``Config``, the method's, and what the rows are
measured with. ``--config file.yaml`` gives them by name; words on the command line win over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.evaluate import Measuring
from fastdiff.cli.methods import Entry, find, methods
from fastdiff.cli.options import field_names, parse, read_yaml, take_option, yaml_words

if TYPE_CHECKING:
    from fastdiff.trainers.config import Config

DEFAULT_METHOD = "ode-pairs"
_OUTPUT = Path("runs/METHOD-TEACHER")


@dataclass(kw_only=True)
class Run:
    """What the run starts from and ends with."""

    teacher: str = "fashion"
    """A bundled teacher (`fashion`, or `fashion-flow`), a diffusers folder, or a hub id."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one prompt a line; the bundled teachers bring their own."""
    sample_height: int | None = None
    """Of a sample in pixels, where the teacher's network knows no size (FLUX, videos); without it that of its pipeline's call."""
    sample_width: int | None = None
    """The same."""
    sample_frames: int | None = None
    """Frames of a sample of a video teacher; without it that of its pipeline's call."""
    evaluate: bool = True
    """Measure teacher and student after the training."""

    @property
    def size(self) -> dict[str, int]:
        """What was said of a sample's size."""
        given = {"height": self.sample_height, "width": self.sample_width, "num_frames": self.sample_frames}
        return {name: value for name, value in given.items() if value is not None}


def engine_options() -> "type[Config]":
    """The engine's ``Config`` with ``--output`` as the name of its folder."""
    from fastdiff.trainers.config import Config

    @dataclass(kw_only=True)
    class Engine(Config):
        output_dir: Annotated[Path, tyro.conf.arg(name="output", metavar="DIR")] = _OUTPUT
        """Folder of the student with its checkpoints, log, pictures, table and report."""

    return Engine


def choose(argv: Sequence[str]) -> tuple[Entry, list[str], str | None, dict[str, Any]]:
    """The method, the words left, and the YAML file with its values."""
    path, words = take_option(list(argv), "--config")
    values = read_yaml(path) if path is not None else {}
    name = str(values.pop("method", DEFAULT_METHOD))
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    return find(name), words, path, values


def run_options(argv: Sequence[str], *, command: str, run: type[Run] = Run) -> tuple[Any, "Config", Any, Measuring]:
    """The options of a command, as objects: its own (a ``Run``), the engine's, the method's, the evaluation's.

    Every command takes all of them, whether it trains and measures or not: the words and files of one fit the others.
    """
    entry, words, path, values = choose(argv)
    method_class, engine_class = entry.load(), engine_options()

    def options(
        run: run,  # type: ignore[valid-type]
        engine: engine_class,  # type: ignore[valid-type]
        method: method_class,  # type: ignore[valid-type]
        measuring: Measuring,
    ) -> tuple[Any, ...]:
        return run, engine, method, measuring

    known = [{"output_dir": "output"}.get(n, n) for n in field_names(run, engine_class, method_class, Measuring)]
    words = [*yaml_words(path or "", values, known), *words]
    description = (
        f"{entry.summary} {entry.paper.get('title', '')}, arXiv {entry.paper.get('arxiv', '-')}. "
        f"Other methods: fastdiff {command} METHOD with one of {', '.join(methods())}. "
        "Options may come from a YAML file: --config FILE."
    )
    chosen, engine, method, measuring = parse(options, words, command=f"{command} {entry.name}", description=description)
    if engine.output_dir == _OUTPUT:
        engine.output_dir = Path("runs") / f"{entry.name}-{Path(chosen.teacher).name}"
    return chosen, engine, method, measuring
