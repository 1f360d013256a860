"""Preference scores by name, as columns of a row.

>>> scores = [load_preference("pickscore"), load_preference("aesthetic", device="cuda")]
>>> evaluate(subject, prompts, preference_metric(scores)).row()          # ..., 'pickscore': 21.3, 'pickscore_se': 0.04, ...
>>> folder_row("runs/images", captions, scores)
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Metric
from fastdiff.eval.preference import PreferenceScore
from fastdiff.eval.stats import Score

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def preference_scores() -> dict[str, Callable[..., PreferenceScore]]:
    """Column name to constructor; all take ``weights``, ``device`` and ``allow_download``."""
    from fastdiff.eval.aesthetic import Aesthetic
    from fastdiff.eval.hpsv2 import FILES, HPSv2
    from fastdiff.eval.image_reward import ImageReward
    from fastdiff.eval.pickscore import PickScore

    hps = {f"hps{version}": partial(HPSv2, version=version) for version in FILES}
    return {"pickscore": PickScore, **hps, "imagereward": ImageReward, "aesthetic": Aesthetic}


def load_preference(name: str, **options: Any) -> PreferenceScore:
    """The score ``name`` with the options of its constructor; ``UserError`` for a name that is none."""
    known = preference_scores()
    if name not in known:
        raise UserError(f"no preference score {name!r}: expected one of {', '.join(known)}.")
    return known[name](**options)


def preference_metric(scores: Sequence[PreferenceScore], *, batch_size: int = 64) -> Metric:
    """A metric for ``evaluate``: columns ``<name>`` and ``<name>_se`` of each score."""

    def metric(images: Tensor, captions: list[str]) -> dict[str, float]:
        return _columns({score.name: score(images, captions, batch_size=batch_size) for score in scores})

    return metric


def folder_row(folder: str | Path, captions: str | Path | Sequence[str], scores: Sequence[PreferenceScore]) -> dict[str, Any]:
    """The row of the images in ``folder``, in the order of their names, which may differ in size.

    Args:
        captions: one an image, or a text file with one a line.

    Returns:
        ``n``, ``<name>`` and ``<name>_se`` of each score, and ``conventions`` by name.

    Raises:
        UserError: no folder, no images in it, not as many as captions, or one of them cannot be read.
    """
    if isinstance(captions, str | Path):
        captions = read_lines(captions)
    files = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) != len(captions) or not files:
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"{folder} holds {len(files)} images ({kinds}) for {len(captions)} captions: expected equal numbers.")
    found: dict[str, list[Tensor]] = {score.name: [] for score in scores}
    for file, caption in zip(files, captions, strict=True):
        image = read_image(file)[None]
        for score in scores:
            found[score.name].append(score(image, [caption]))
    columns = _columns({name: torch.cat(values) for name, values in found.items()})
    return {"n": len(files), **columns, "conventions": {score.name: score.conventions for score in scores}}


def read_lines(file: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, empty ones as well; ``UserError`` when it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions' file {file}: {error}. Pass a UTF-8 text, one caption a line.") from error


def read_image(file: str | Path) -> Tensor:
    """An image file as RGB [3, H, W] in [0, 1]; ``UserError`` when it is none or has a transparent part."""
    try:
        with Image.open(file) as opened:
            if opened.has_transparency_data:
                raise UserError(f"{file} has an alpha channel: composite it on the background that should be scored.")
            pixels = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read the image {file}: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def _columns(values: dict[str, Tensor]) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, scores in values.items():
        found = Score.of(scores)
        columns[name] = found.value
        if len(scores) > 1:  # one image has no error, and JSON no nan
            columns[f"{name}_se"] = found.se
    return columns
