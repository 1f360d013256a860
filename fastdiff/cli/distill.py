"""``fastdiff distill [METHOD]``: train a student, save it, measure it beside its teacher, show both.

Options are the fields of three dataclasses, flat: the ones below, the engine's ``Config`` and the method's own. With
``--config file.yaml`` they come from a file (which may name the ``method``); words on the command line win over it.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.evaluate import Measuring, measure, summary
from fastdiff.cli.loading import quiet
from fastdiff.cli.training import Run, run_options

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result
    from fastdiff.eval.protocol import Protocol
    from fastdiff.trainers.config import Config
    from fastdiff.trainers.engine import Trainer


def parsed(argv: Sequence[str]) -> tuple[Run, "Config", Any, Measuring]:
    """All options of a run."""
    return run_options(argv, command="distill")


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
    teacher = Teacher.from_pretrained(options.teacher, size=options.size)
    trainer = Trainer(method, teacher, prompts=options.prompts, config=config)
    with _resumable(argv, config.output_dir):
        pipeline = trainer.train()
    if pipeline is None:  # a process of several that has nothing to save
        return 0
    measures = options.evaluate and method.delivers == "pipeline"  # scenes make no image of a prompt
    measured = _evaluated(trainer, pipeline, options.teacher, measuring) if measures else ([], None, {})
    report(trainer, *measured, command=shlex.join(["fastdiff", "distill", *argv]))
    return 0


def _evaluated(
    trainer: "Trainer", pipeline: Any, teacher: str, measuring: Measuring
) -> "tuple[list[Result], Protocol | None, dict[str, Any]]":
    folder, prompts = trainer.config.output_dir, trainer.prompts.prompts
    try:
        return measure({"student": pipeline}, trainer.teacher.pipeline, measuring, prompts=prompts)
    except KeyboardInterrupt as stop:
        evaluate = shlex.join(["fastdiff", "eval", trainer.teacher.name, str(folder)])
        raise KeyboardInterrupt(f"stopped; the student in {folder} is complete, measure it with:\n  {evaluate}") from stop


def report(
    trainer: "Trainer", results: "list[Result]", protocol: "Protocol | None", facts: dict[str, Any], *, command: str
) -> None:
    """Print the table; write ``result.json``, with results ``report.html`` and ``grid.png`` too; say where to look."""
    from fastdiff.eval.report import environment, grid_png, html_report, read_curves, rows_json

    folder = trainer.config.output_dir
    if results:
        print(f"\n{summary([result.row() for result in results], protocol, facts)}\n")
    named = {} if protocol is None else {"protocol": protocol.record}
    about = {**named, "evaluation": facts, "command": command, "environment": environment()}
    rows_json(folder / "result.json", results, **trainer.result, **about)
    if results:
        title = f"{trainer.result['method']} student of {trainer.teacher.name}"
        shown = {**trainer.result, **{f"evaluation, {name}": value for name, value in facts.items()}}
        html_report(
            folder / "report.html",
            results,
            title=title,
            command=command,
            facts=shown,
            protocol=protocol,
            curves=read_curves(folder / "log.jsonl"),
        )
        grid_png(folder / "grid.png", {result.model: result.images for result in results}, results[0].prompts)
        print(f"picture  {folder / 'grid.png'}\nreport   {folder / 'report.html'}")
    if trainer.method.delivers == "scenes":
        print(f"scenes   {folder}, to look at from anywhere: fastdiff.models.scenes.load_scenes({str(folder)!r})")
        return
    call = "".join(f", {key}={value}" for key, value in trainer.method.schedule(trainer.teacher).call.items())
    print(f'student  {folder}, for plain diffusers: DiffusionPipeline.from_pretrained("{folder}")(prompt{call}).images[0]')
