"""What a folder of generated images says of itself: the header that ``generate`` writes, and the costs of all its ranks.

>>> Generation.open("images").nfe                          # measured over interruptions and processes
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError

FORMAT, HEADER, COSTS = "fastdiff-images-1", "generation.json", "generation-cost-*.json"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generated folder: its settings, and what its images cost so far."""

    folder: Path
    model: str
    settings: Mapping[str, Any]
    """All that decides the images: identity, n, prompts_sha256, seed, steps, guidance_scale, resolution, noise, image."""
    sizes: Mapping[str, Any]
    """parameters_m, pipeline_parameters_m and size_mb of the model."""
    drawn: int
    """Images that were drawn and timed; redrawn ones count again."""
    calls: int | None
    """Rows that passed the denoiser for them; None where no network was known."""
    seconds: float
    """Time spent in drawing, summed over the processes."""

    @classmethod
    def open(cls, folder: str | Path) -> "Generation":
        """Read the header and the costs of all ranks; ``UserError`` when there is none or it is another format."""
        path = Path(folder)
        if not (path / HEADER).is_file():
            raise UserError(f"{path} has no {HEADER}: it was not written by fastdiff, so its model, seed and prompts are unknown.")
        facts = read_json(path / HEADER)
        if facts.get("format") != FORMAT:
            raise UserError(f"{path / HEADER} says format {facts.get('format')!r}: expected {FORMAT!r}.")
        costs = [read_json(file) for file in sorted(path.glob(COSTS))]
        calls = [cost["calls"] for cost in costs]
        return cls(
            folder=path,
            model=facts["model"],
            settings=facts["settings"],
            sizes=facts["sizes"],
            drawn=sum(cost["drawn"] for cost in costs),
            calls=None if not calls or None in calls else sum(calls),
            seconds=sum(cost["seconds"] for cost in costs),
        )

    @property
    def nfe(self) -> float | None:
        """Network calls an image, measured."""
        return None if self.calls is None else self.calls / self.drawn

    @property
    def images_per_s(self) -> float | None:
        """Images a second of one process, without the writing of files; k processes make about k times as many."""
        return self.drawn / self.seconds if self.seconds else None

    @property
    def known(self) -> dict[str, Any]:
        """The cost columns of a ``Result``."""
        return {"nfe": self.nfe, "images_per_s": self.images_per_s, **self.sizes}

    def missing(self) -> list[int]:
        """Indices whose image is not there."""
        return [i for i in range(self.settings["n"]) if not image_path(self.folder, i).is_file()]


def image_path(folder: str | Path, index: int) -> Path:
    """Where image ``index`` is."""
    return Path(folder) / f"{index:06d}.png"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``UserError`` when it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}. Delete the folder and generate again.") from error
    return dict(found)
