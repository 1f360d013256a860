"""``fastdiff eval DIR_OR_ID ...``: pipelines side by side, in a table, a JSON file and a page.

In the bundled world every row gets all scores of the classifier's features, CLIP and attribute scores, and a row of real
photographs is the floor. Elsewhere ``--protocol`` with a reference scores pipelines and folders of images; without it the rows
hold the cost, and the page shows the pictures. Folders with a ``fastdiff.json`` are students and are called bare; the other
pipeline, at most one without ``--protocol``, is the teacher. ``fastdiff eval VERB`` does something else: see ``cli.verbs``.
"""

import importlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.loading import open_pipeline
from fastdiff.cli.options import check_outputs, nearest, parse
from fastdiff.cli.protocols import Scoring, notes, protocol_rows
from fastdiff.cli.verbs import VERBS
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.eval.evaluate import Result
    from fastdiff.eval.protocol import Protocol

Progress = Callable[[float, str], None]
_WORLD_IMAGES, _OTHER_IMAGES = 2000, 8


@dataclass(kw_only=True)
class Measuring:
    """What the rows are measured with."""

    num_images: int | None = None
    """Images per row; by default 2000 in the bundled world and 8 elsewhere."""
    teacher_steps: tuple[int, ...] | None = None
    """Inference steps of the teacher, a row each; by default 25 and 1, under --protocol the pipeline's own (`fashion`: 25)."""
    teacher_guidance_scale: float | None = None
    """Guidance of the teacher's rows, 1 is off; by default 3, under --protocol the pipeline's own (`fashion`: 3)."""

    @property
    def rows_of_teacher(self) -> tuple[tuple[int, ...], float]:
        """Steps and guidance without a protocol."""
        steps = (25, 1) if self.teacher_steps is None else self.teacher_steps
        return steps, 3.0 if self.teacher_guidance_scale is None else self.teacher_guidance_scale


@dataclass(kw_only=True)
class Options:
    pipelines: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DIR_OR_ID [DIR_OR_ID ...]")]
    """Folders written by fastdiff or diffusers, hub ids, or a bundled teacher, `fashion` or `fashion-flow`."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the rows as JSON, with the protocol; a name ending in .jsonl gets one line a row."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write one self-contained HTML page."""
    grid: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """Write the picture: one row a model, one column a prompt and its noise."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """One prompt a line, for pipelines outside the bundled world."""
    seed: int = 0
    """Seed of the prompts and of the initial noise."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def of_the_world(pipeline: Any) -> bool:
    """Whether a pipeline speaks the captions of the bundled world: its tokenizer has exactly a vocabulary of that world."""
    from fastdiff.data.fashion import gemma_tokenizer, vocabulary

    tokenizer = getattr(pipeline, "tokenizer", None)
    return tokenizer is not None and tokenizer.get_vocab() in (vocabulary()[0], gemma_tokenizer().get_vocab())


def measure(
    students: dict[str, Any], teacher: Any, measuring: Measuring, *, prompts: Sequence[str] | None, seed: int = 0
) -> "tuple[list[Result], Protocol | None, dict[str, Any]]":
    """One result a row (teacher, students, in the bundled world real photographs), its protocol, the conventions of the scores.

    Args:
        students: pipelines by name; a single one is called "student".
        teacher: a pipeline or None.
        prompts: what pipelines outside the bundled world draw.

    Raises:
        UserError: there are too many or too few images, or no prompts; or images of a pipeline are not finite.
    """
    world = all(map(of_the_world, [*students.values(), *([teacher] if teacher is not None else [])]))
    n = measuring.num_images if measuring.num_images is not None else (_WORLD_IMAGES if world else _OTHER_IMAGES)
    if n < 2 or (world and n > _WORLD_IMAGES):
        most = f" and at most {_WORLD_IMAGES}, the number of held-out photographs" if world else ""
        raise UserError(f"--num-images is {n}; it must be at least 2{most}.")
    check_steps(measuring.teacher_steps)
    asked = [] if world else drawn(prompts or [], n)
    try:
        if world:
            return _scores(students, teacher, measuring, n, seed)
        return _costs(students, teacher, measuring, asked, seed), None, {"seed": seed}
    except ValueError as error:  # the evaluation's own: what it says is about the images
        raise UserError(str(error)) from error


def check_steps(steps: Sequence[int] | None) -> None:
    """A ``UserError`` for numbers of steps that nobody can take."""
    if steps and min(steps) < 1:
        raise UserError(f"--teacher-steps holds {min(steps)}; each must be at least 1.")


def _scores(
    students: dict[str, Any], teacher: Any, measuring: Measuring, n: int, seed: int
) -> "tuple[list[Result], Protocol, dict[str, Any]]":
    from fastdiff.eval.fashion import FashionMetrics, fashion_rows
    from fastdiff.eval.protocol import Protocol

    metric, (steps, scale) = FashionMetrics.load(), measuring.rows_of_teacher
    with _progress() as progress:
        results = fashion_rows(
            next(iter(students.values())) if len(students) == 1 else students,
            teacher,
            n=n,
            seed=seed,
            guidance_scale=scale,
            teacher_steps=steps,
            metric=metric,
            progress=progress,
        )
    conventions = {f"CLIP score: {name}": value for name, value in metric.clip.conventions.items()}
    return results, Protocol.load("fashion").replace(n=n, seed=seed), {"seed": seed, **notes(results), **conventions}


def drawn(prompts: Sequence[str], n: int) -> list[str]:
    """``n`` prompts, the given ones again and again."""
    if not prompts:
        raise UserError("nothing to draw: outside the bundled world give --prompts, a text file with one prompt a line.")
    return [prompts[i % len(prompts)] for i in range(n)]


def _costs(students: dict[str, Any], teacher: Any, measuring: Measuring, prompts: list[str], seed: int) -> "list[Result]":
    from fastdiff.eval.evaluate import evaluate
    from fastdiff.eval.pipeline import pipeline_subject

    steps, scale = measuring.rows_of_teacher
    rows = steps if teacher is not None else ()
    subjects = [pipeline_subject("teacher", teacher, steps=k, guidance_scale=scale) for k in rows]
    for name, pipeline in students.items():
        subjects.append(pipeline_subject(f"student {name}" if len(students) > 1 else "student", pipeline))
    results = []
    with _progress() as progress:
        for i, subject in enumerate(subjects):
            progress(i / len(subjects), subject.name)
            results.append(evaluate(subject, prompts, lambda images, captions: {}, seed=seed, batch_size=1, repeats=3))
    return results


@contextmanager
def _progress() -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(total=100, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", dynamic_ncols=True) as bar:

        def report(share: float, label: str) -> None:
            bar.set_description_str(f"evaluating {label}", refresh=False)
            bar.update(100 * share - bar.n)

        yield report
        bar.update(100 - bar.n)


def summary(rows: "Sequence[Mapping[str, Any]]", protocol: "Protocol | None", facts: "Mapping[str, Any]") -> str:
    """The table for the terminal, the distance under the name and hash of its protocol."""
    from fastdiff.eval.report import table

    if protocol is None:
        return table(rows)
    label = facts.get("score", f"FD[{protocol.extractor}]")
    shown = table(rows, brief=True, names={"fd": label})
    said = "".join(f"\n{name}: {text}" for name, text in facts.items() if name.startswith("note on "))
    return f"{shown}\n\n{protocol.label(label)}; all scores are in the JSON file and on the page{said}"


def check(options: Options) -> tuple[dict[str, str], str | None]:
    """The students by the name of their row, and the teacher; a ``UserError`` before anything is loaded."""
    names = list(dict.fromkeys(options.pipelines))
    if names and "?" in (hint := nearest(names[0], VERBS)) and not Path(names[0]).exists():
        raise UserError(f"no folder {names[0]}, and no verb of that name{hint}")
    if not names:
        raise UserError("no pipeline to evaluate; give one or more folders, hub ids, or `fashion`.")
    _check_folders(names)
    students = [name for name in names if (Path(name) / "fastdiff.json").is_file()]
    teachers = [name for name in names if name not in students]
    if len(teachers) > 1:
        raise UserError(f"{' and '.join(teachers)} are no students of fastdiff; evaluate one teacher at a time.")
    short = len({Path(name).name for name in students}) == len(students)
    return {Path(name).name if short else name: name for name in students}, teachers[0] if teachers else None


def _check_folders(names: Sequence[str]) -> None:
    """Blame folders that are not there, unless the one name may be a hub id, and folders of images."""
    folders = [name for name in names if Path(name).is_dir()]
    gone = [name for name in names if name not in folders and "/" in name]
    if gone and (len(names) - len(folders) > 1 or gone[0].count("/") != 1):
        raise UserError(
            f"there is no folder {gone[0]}. (A hub id is a teacher, too: without --protocol, evaluate one teacher at a time.)"
        )
    for name in folders:
        if not (Path(name) / "fastdiff.json").is_file() and not (Path(name) / "model_index.json").is_file():
            from fastdiff.eval.sources import image_folder

            if image_folder(name):
                raise UserError(
                    f"{name} is a folder of images, whose scores need a protocol: give --protocol, such as clean, with --reference."
                )


def read_prompts_of(path: Path | None) -> list[str] | None:
    """The lines of a prompts file."""
    from fastdiff.data.prompts import read_prompts

    nobody: Any = None  # a teacher is asked only when there is no file
    return None if path is None else read_prompts(path, nobody)


def _measured(chosen: Options, measuring: Measuring, scoring: Scoring) -> "tuple[list[Result], Protocol | None, dict[str, Any]]":
    prompts = read_prompts_of(chosen.prompts)
    if scoring.protocol:
        if not chosen.pipelines:
            raise UserError("nothing to evaluate; give one or more folders, hub ids, or `fashion`.")
        check_steps(measuring.teacher_steps)
        return protocol_rows(
            list(dict.fromkeys(chosen.pipelines)),
            scoring,
            prompts or [],
            steps=measuring.teacher_steps,
            guidance_scale=measuring.teacher_guidance_scale,
            num_images=measuring.num_images,
            seed=chosen.seed,
            device=chosen.device,
        )
    students, teacher = check(chosen)
    opened = None if teacher is None else open_pipeline(teacher, chosen.device)
    pipelines = {name: open_pipeline(folder, chosen.device) for name, folder in students.items()}
    if prompts and all(map(of_the_world, [*pipelines.values(), *([opened] if opened is not None else [])])):
        raise UserError("--prompts changes nothing in the bundled world, whose captions are drawn by --seed: leave it out.")
    return measure(pipelines, opened, measuring, prompts=prompts, seed=chosen.seed)


def run(argv: Sequence[str]) -> int:
    """Measure, print the table, write what was asked for; or do what a verb says."""
    if argv and argv[0] in VERBS:
        verb = importlib.import_module(f"fastdiff.cli.verbs.{argv[0]}")
        return int(verb.run(argv[1:]))

    def options(general: Options, measuring: Measuring, scoring: Scoring) -> tuple[Options, Measuring, Scoring]:
        return general, measuring, scoring

    verbs = "".join(f"\n  {name:8} {does}" for name, does in VERBS.items())
    chosen, measuring, scoring = parse(
        options,
        argv,
        command="eval",
        description=f"Measure pipelines side by side. Verbs, explained by `fastdiff eval VERB --help`:{verbs}",
    )
    check_outputs(json=chosen.json, report=chosen.report, grid=chosen.grid)
    results, protocol, facts = _measured(chosen, measuring, scoring)
    from fastdiff.eval.report import environment, grid_png, html_report, rows_json, rows_jsonl

    print(summary([result.row() for result in results], protocol, facts))
    command = shlex.join(["fastdiff", "eval", *argv])
    if chosen.json:
        named = {} if protocol is None else {"protocol": protocol.record}
        if chosen.json.suffix == ".jsonl":
            rows_jsonl(chosen.json, results, protocol="" if protocol is None else f"{protocol.name}#{protocol.hash}")
        else:
            rows_json(chosen.json, results, **named, evaluation=facts, command=command, environment=environment())
    if chosen.report:
        names = {"fd": facts["score"]} if "score" in facts else None
        html_report(chosen.report, results, command=command, facts=facts, protocol=protocol, names=names)
    if chosen.grid:
        grid_png(chosen.grid, {result.model: result.images for result in results}, results[0].prompts)
    return 0
