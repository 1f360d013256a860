"""Train candidates under the same conditions and write one row a run: the tables of the methods, and how the default was settled.

A YAML file names the candidates; each value holds `method` and any fields of the method or options of the engine:

    pairs-3000: {method: ode-pairs, pairs: 3000, max_steps: 900}

``from: fashion-flow`` trains it from another teacher than ``fashion``.
``also: [1, 2, 8]`` measures the same student at other numbers of steps too, each exported as the method would have.
``teacher: fashion`` in the place of a method measures a teacher itself, at ``steps`` and ``guidance_scale``, whatever the seed.
``begin: NAME`` begins the student from that of an earlier candidate of the same seed; its seconds are not counted again.
Candidates of the same seed share their ODE pairs, if they ask for the same ones: only the first one's seconds hold their making.

python eval/compare_methods.py docs/results/default.yaml --output docs/results/default.csv --seeds 0
"""

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

import tyro
import yaml
from safetensors.torch import load_file

import fastdiff.trainers
from fastdiff import Teacher, Trainer
from fastdiff.data.fashion import random_captions
from fastdiff.eval.cost import network_of
from fastdiff.eval.diversity import prompt_diversity
from fastdiff.eval.evaluate import Result
from fastdiff.eval.fashion import fashion_rows
from fastdiff.models.roles import Start
from fastdiff.pipelines.export import export_pipeline
from fastdiff.trainers.config import Config

METHODS: dict[str, Any] = {method.name(): method for method in (getattr(fastdiff.trainers, n) for n in fastdiff.trainers.__all__)}
NOT_ENGINE = {"method", "begin", "from", "also"}
COLUMNS = [
    "candidate",
    "seed",
    "steps",
    "seconds_train",
    "fd",
    "fd_se",
    "attributes",
    "attributes_se",
    "clip",
    "diversity",
    "nfe",
    "settings",
]


def share_pairs(folder: Path, seed: int) -> None:
    """Copy the pairs of another candidate of this seed; a run uses them only if they are what it would make itself."""
    found = sorted(folder.parent.glob(f"*-{seed}/pairs-0.safetensors"), key=lambda path: path.stat().st_mtime)
    if found and not folder.exists():
        folder.mkdir(parents=True)
        shutil.copyfile(found[0], folder / "pairs-0.safetensors")


def begin_from(folder: Path) -> Start:
    """The student of an exported folder, without the guidance embedding that the export added."""
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return Start(weights={"student": {key: value for key, value in weights.items() if "cond_proj" not in key}})


def train(settings: dict, seed: int, folder: Path) -> tuple[dict[str, Any], dict]:
    """The trained student at each number of steps that is asked for, by what its name ends in, and what the run says."""
    method = METHODS[settings["method"]]
    fields = {field.name for field in dataclasses.fields(method)}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in fields}
    rest = {key: value for key, value in settings.items() if key not in fields | NOT_ENGINE}
    config = Config.of(**rest, output_dir=folder, seed=seed, save_every=10**6, validate_every=0)
    share_pairs(folder, seed)
    start = begin_from(folder.parent / f"{settings['begin']}-{seed}") if "begin" in settings else None
    trainer = Trainer(method(**own), Teacher.from_pretrained(settings.get("from", "fashion")), config=config, start=start)
    students = {"": trainer.train()}
    for steps in settings.get("also", ()):
        restepped = dataclasses.replace(cast(Any, trainer.method), steps=steps)
        students[f"@{steps}"] = at_steps(restepped, trainer.teacher, students[""], folder)
    return students, trainer.result


def at_steps(method: Any, teacher: Teacher, student: Any, folder: Path) -> Any:
    """The pipeline of a student that is called ``method.steps`` times."""
    target, prompt = folder / f"steps-{method.steps}", random_captions(1, 0)[0]
    return export_pipeline(teacher, network_of(student), target, method.schedule(teacher), note=method.note(teacher), prompt=prompt)


def measured(name: str, settings: dict, seed: int, folder: Path, n: int) -> tuple[dict[str, Result], dict]:
    """What is evaluated of a candidate, by the names of its rows, and what the run says of itself."""
    if "teacher" in settings:
        given = {"teacher_steps": (settings["steps"],), "guidance_scale": settings["guidance_scale"]}
        rows = fashion_rows({}, Teacher.from_pretrained(settings["teacher"]).pipeline, n=n, **given)
        return {name: rows[0]}, {"seed": seed, "steps": 0, "seconds_train": 0.0}
    students, result = train(settings, seed, folder)
    return {name + end: fashion_rows({name: student}, None, n=n)[0] for end, student in students.items()}, result


def diversity(result: Any) -> float:
    """Mean feature distance of images of the same prompt, over the prompts that were drawn twice or more."""
    rows = [i for i, prompt in enumerate(result.prompts) if result.prompts.count(prompt) > 1]
    return prompt_diversity(result.features[rows], [result.prompts[i] for i in rows]).value


def main(
    candidates: tyro.conf.Positional[Path],
    output: Path = Path("docs/results/compare.csv"),
    seeds: tuple[int, ...] = (0,),
    only: tuple[str, ...] = (),
    n: int = 2000,
    runs: Path = Path("runs/compare"),
) -> None:
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        for name, settings in yaml.safe_load(candidates.read_text()).items():
            for seed in seeds if not only or name in only else ():
                if "teacher" in settings and seed != seeds[0]:
                    continue
                rows, result = measured(name, settings, seed, runs / f"{name}-{seed}", n)
                facts = {"settings": settings, **{k: result[k] for k in ("seed", "steps", "seconds_train")}}
                for candidate, evaluated in rows.items():
                    row = {**evaluated.row(), "diversity": diversity(evaluated), "candidate": candidate, **facts}
                    writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                    file.flush()
                    print(f"{candidate} seed {seed}: FD {row['fd']:.3f} attributes {row['attributes']:.3f} nfe {row['nfe']:g}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
