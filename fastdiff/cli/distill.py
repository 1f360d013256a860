"""``fastdiff distill [METHOD]``: train a student, save it, measure it beside its teacher, show both.

Options are the fields of three dataclasses, flat: the ones below, the engine's ``Config`` and the method's own. With
``--config file.yaml`` they come from a file (which may name the ``method``); words on the command line win over it.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.evaluate import Measuring, measure
from fastdiff.cli.loading import quiet
from fastdiff.cli.methods import Entry, find, methods
from fastdiff.cli.options import field_names, parse, read_yaml, take_option, yaml_words

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result
    from fastdiff.trainers.config import Config
    from fastdiff.trainers.engine import Trainer

DEFAULT_METHOD = "ode-pairs"
_OUTPUT = Path("runs/METHOD-TEACHER")


@dataclass(kw_only=True)
class Run:
    """What the run starts from and ends with."""

    teacher: str = "fashion"
    """The bundled teacher `fashion`, a diffusers folder, or a hub id."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one prompt a line; the bundled teacher brings its own."""
    evaluate: bool = True
    """Measure teacher and student after the training."""


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


def parsed(argv: Sequence[str]) -> tuple[Run, "Config", Any, Measuring]:
    """All options of a run."""
    entry, words, path, values = choose(argv)
    method_class, engine_class = entry.load(), engine_options()

    def options(
        run: Run,
        engine: engine_class,  # type: ignore[valid-type]
        method: method_class,  # type: ignore[valid-type]
        measuring: Measuring,
    ) -> tuple[Any, ...]:
        return run, engine, method, measuring

    known = [{"output_dir": "output"}.get(n, n) for n in field_names(Run, engine_class, method_class, Measuring)]
    words = [*yaml_words(path or "", values, known), *words]
    description = (
        f"{entry.summary} {entry.paper.get('title', '')}, arXiv {entry.paper.get('arxiv', '-')}. "
        f"Other methods: fastdiff distill METHOD with one of {', '.join(methods())}. "
        "Options may come from a YAML file: --config FILE."
    )
    run, engine, method, measuring = parse(options, words, command=f"distill {entry.name}", description=description)
    if engine.output_dir == _OUTPUT:
        engine.output_dir = Path("runs") / f"{entry.name}-{Path(run.teacher).name}"
    return run, engine, method, measuring


@contextmanager
def _resumable(argv: Sequence[str], folder: Path) -> Iterator[None]:
    """Let Ctrl-C end with a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        words = ["fastdiff", "distill", *argv]
        if any((folder / "checkpoints").glob("step-*")):
            words += ["--resume"] if "--resume" not in argv else []
            reason = str(stop) or "stopped; continue with --resume"
        else:
            reason = "stopped before the first checkpoint; start again"
        raise KeyboardInterrupt(f"{reason}:\n  {shlex.join(words)}") from stop


def run(argv: Sequence[str]) -> int:
    """Train, evaluate, write, print."""
    options, config, method, measuring = parsed(argv)
    from fastdiff.models.teacher import Teacher
    from fastdiff.trainers.engine import Trainer

    quiet()
    teacher = Teacher.from_pretrained(options.teacher)
    trainer = Trainer(method, teacher, prompts=options.prompts, config=config)
    with _resumable(argv, config.output_dir):
        pipeline = trainer.train()
    if pipeline is None:  # a process of several that has nothing to save
        return 0
    results, facts = _evaluated(trainer, pipeline, options.teacher, measuring) if options.evaluate else ([], {})
    report(trainer, results, facts, command=shlex.join(["fastdiff", "distill", *argv]))
    return 0


def _evaluated(trainer: "Trainer", pipeline: Any, teacher: str, measuring: Measuring) -> "tuple[list[Result], dict[str, Any]]":
    folder, prompts = trainer.config.output_dir, trainer.prompts.prompts
    try:
        return measure({"student": pipeline}, trainer.teacher.pipeline, measuring, prompts=prompts)
    except KeyboardInterrupt as stop:
        evaluate = shlex.join(["fastdiff", "eval", trainer.teacher.name, str(folder)])
        raise KeyboardInterrupt(f"stopped; the student in {folder} is complete, measure it with:\n  {evaluate}") from stop


def report(trainer: "Trainer", results: "list[Result]", facts: dict[str, Any], *, command: str) -> None:
    """Print the table; write ``result.json``, with results ``report.html`` and ``grid.png`` too; say where to look."""
    from fastdiff.eval.report import environment, grid_png, html_report, rows_json, table

    folder = trainer.config.output_dir
    if results:
        print(f"\n{table([result.row() for result in results])}\n")
    about = {"evaluation": facts, "command": command, "environment": environment()}
    rows_json(folder / "result.json", results, **trainer.result, **about)
    if results:
        title = f"{trainer.result['method']} student of {trainer.teacher.name}"
        shown = {**trainer.result, **{f"evaluation, {name}": value for name, value in facts.items()}}
        html_report(folder / "report.html", results, title=title, command=command, facts=shown)
        grid_png(folder / "grid.png", {result.model: result.images for result in results}, results[0].prompts)
        print(f"picture  {folder / 'grid.png'}\nreport   {folder / 'report.html'}")
    print(f'student  {folder}, for plain diffusers: DiffusionPipeline.from_pretrained("{folder}")(prompt).images[0]')
