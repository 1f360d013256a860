"""Options from dataclasses by tyro, and from YAML files: flat, checked by name and type, later words win."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from fastdiff.errors import UserError

T = TypeVar("T")


#: What other programs call an option, and its name here: no spelling is near.
SYNONYMS = {
    "learning_rate": "lr",
    "iterations": "max_steps",
    "num_train_steps": "max_steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_inference_steps": "steps",
    "cfg": "guidance_scale",
    "guidance_scale": "guidance_range",
    "model": "teacher",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: its synonym or nearest neighbour, if there is one."""
    names = list(known)
    near = synonyms(word, names) or difflib.get_close_matches(word, names, n=1)
    return f", did you mean '{near[0]}'?" if near else "."


def synonyms(word: str, known: Iterable[str]) -> list[str]:
    """The known options that ``word`` may mean by ``SYNONYMS``: that name itself, or those that end in it (``fake_score_lr``)."""
    names, word = list(known), word.replace("-", "_")
    meant = SYNONYMS.get(word)
    if meant is None or word in names:
        return []
    return [meant] if meant in names else [name for name in names if name.endswith(f"_{meant}")]


def parse(options: Callable[..., T], argv: Sequence[str], *, command: str, description: str) -> T:
    """Call ``options`` with its dataclass arguments filled from ``argv``; a wrong option ends in exit code 2.

    ``UserError`` for the name that another program has for an option of these.
    """
    known = field_names(*(parameter.annotation for parameter in inspect.signature(options).parameters.values()))
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and (near := synonyms(name[2:].replace("-", "_"), known)):
            raise UserError(f"no option {name}, did you mean --{near[0].replace('_', '-')}?")
    return tyro.cli(options, args=argv, prog=f"fastdiff {command}", description=description, config=(tyro.conf.OmitArgPrefixes,))


def field_names(*classes: Any) -> list[str]:
    """The names of all fields of some dataclasses."""
    return [field.name for cls in classes for field in dataclasses.fields(cls)]


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping of options in a YAML file, keys with underscores."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--config {path} cannot be read: {reason}.") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds a {type(values).__name__}, expected a mapping such as 'max_steps: 500'.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def yaml_words(path: str, values: dict[str, Any], known: Sequence[str]) -> list[str]:
    """A YAML mapping as words: ``{max_steps: 5, ratio: [1, 5], resume: true}`` to ``--max-steps=5 --ratio 1 5 ...``."""
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"--config {path}: no option '{key}'{nearest(key, known)}")
        if isinstance(value, dict):
            raise UserError(f"--config {path}: '{key}' holds a mapping, but options are flat: write its keys one level up.")
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE`` and the words without it."""
    for i, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
        if word == name:
            if i + 1 == len(argv):
                raise UserError(f"{name} needs a file.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def columns(rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows as aligned lines: the first ``left`` columns to the left, the others to the right."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in table]


def result_file(path: Path) -> Path:
    """A result file, or that of a run's folder."""
    return path / "result.json" if path.is_dir() else path


def check_outputs(**paths: Path | None) -> None:
    """A ``UserError`` for an output that cannot be a file, before any work is done for it."""
    for name, path in paths.items():
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder: give the name of a file in it.")
