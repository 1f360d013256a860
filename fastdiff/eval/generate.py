"""A folder of generated images: resumable, split over processes, and the same files whoever draws them.

    000000.png ...                 8 bits, rounded, written aside and renamed
    generation.json                what decides the images; written first, and again by nobody
    generation-cost-<rank>.json    images drawn, network calls and seconds, summed over a rank's runs

Image i's randomness depends on (seed, i) alone. The indices are cut into fixed blocks of ``batch_size``; rank r takes blocks
r, r + world_size, ... and none is padded. A block that an interruption left half done is drawn whole and only its missing
images are written, so a resumed folder and one of several processes hold the bytes of a straight run. Another batch size
changes images by the rounding of the arithmetic only, in 8 bits by one level here and there.

>>> generate(subject, prompts, "images", seed=0, batch_size=16, rank=state.process_index, world_size=state.num_processes)
>>> Generation.open("images").nfe                          # after all processes: measured over interruptions
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data.images import to_uint8
from fastdiff.errors import UserError
from fastdiff.eval.cost import count_calls
from fastdiff.eval.generation import FORMAT, HEADER, Generation, image_path, read_json
from fastdiff.eval.subject import Subject, checked, prompts_hash
from fastdiff.files import aside

MOST = 10**6


def generate(
    subject: Subject,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seed: int = 0,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Draw the images of this rank's share that ``folder`` misses, and say how many were written.

    Args:
        prompts: of all images; image i is of ``prompts[i]``.
        seed: of the noise.
        rank, world_size: this process and their number, such as accelerate's ``PartialState`` tells. Nothing waits for the others.
        progress: called with the number of images of the share that are finished, found or drawn.

    Raises:
        UserError: the folder holds images of other settings, which are named, or of unknown origin; the subject is stored.
        ValueError: images are not finite, or leave [0, 1].
    """
    if subject.stored is not None:
        raise UserError(f"{subject.name} is a folder of images already: there is nothing to draw. Pass a model.")
    if not 0 < len(prompts) <= MOST:
        raise UserError(f"{len(prompts)} prompts: a folder holds 1 to {MOST} images, six digits each.")
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UserError(
            f"batch_size {batch_size}, rank {rank} of {world_size}: expected a batch of 1 or more and 0 <= rank < world."
        )
    path = Path(folder)
    _claim(path, subject, prompts, seed, rank)
    cost, written = _Cost.read(path, rank), 0
    for block in torch.arange(len(prompts)).split(batch_size)[rank::world_size]:  # fixed, so that batches are those of any run
        ids = block.tolist()
        todo = [i for i in ids if not image_path(path, i).is_file()]
        if todo:
            images = cost.draw(subject, prompts[ids[0] : ids[-1] + 1], seed, ids)
            for i in todo:
                _write(images[i - ids[0]], image_path(path, i))
            cost.write()
            written += len(todo)
        if progress:
            progress(len(ids))
    return written


def settings_of(subject: Subject, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """Everything that decides the images of a folder, as JSON holds it."""
    return {
        "identity": subject.name if subject.identity is None else subject.identity(),
        "n": len(prompts),
        "prompts_sha256": prompts_hash(prompts),
        "seed": seed,
        "steps": subject.steps,
        "guidance_scale": subject.guidance_scale,
        "resolution": None if subject.resolution is None else list(subject.resolution),
        "noise": "image",
        "image": "png, 8 bits, rounded",
        **({} if subject.scheduler == "" else {"scheduler": subject.scheduler}),  # none in the header of older folders
    }


def _claim(path: Path, subject: Subject, prompts: Sequence[str], seed: int, rank: int) -> None:
    """Write the header, or hold it against the one that is there."""
    settings, header = settings_of(subject, prompts, seed), path / HEADER
    images = any(path.glob("*.png"))  # looked for first: another rank's image comes after its header
    if not header.is_file():
        if images:
            raise UserError(f"{path} holds images and no {HEADER}, so nobody knows of what. Pass an empty folder.")
        facts = {"format": FORMAT, "model": subject.name, "settings": settings, "sizes": subject.sizes()}
        mine = path / f".generation-{rank}.json"
        with aside(mine) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        mine.replace(header)  # each rank its own part: all write the same header
    there = Generation.open(path).settings
    keys = dict.fromkeys([*there, *settings])
    if differ := [
        f"{key}: {there.get(key)!r} there, {settings.get(key)!r} asked for" for key in keys if there.get(key) != settings.get(key)
    ]:
        raise UserError(
            f"{path} was generated with other settings, and its images would be mixed. They differ in {'; '.join(differ)}. "
            "Pass another folder, or the settings that it began with."
        )


def _write(image: Tensor, path: Path) -> None:
    from PIL import Image

    with aside(path) as part:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy()).save(part, format="PNG")


@dataclass(kw_only=True)
class _Cost:
    """What this rank has drawn in this folder, now and in earlier runs."""

    path: Path
    drawn: int = 0
    calls: int | None = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path, rank: int) -> "_Cost":
        path = folder / f"generation-cost-{rank:05d}.json"
        return cls(path=path, **read_json(path)) if path.is_file() else cls(path=path)

    def draw(self, subject: Subject, prompts: Sequence[str], seed: int, ids: list[int]) -> Tensor:
        network, began = nn.Identity() if subject.network is None else subject.network, time.perf_counter()
        with count_calls(network) as calls:
            images = subject.draw(prompts, seed=seed, indices=ids)
        self.seconds += time.perf_counter() - began
        self.drawn += len(ids)
        self.calls = None if subject.network is None or self.calls is None else self.calls + calls.samples
        return checked(images, len(ids), subject.name)

    def write(self) -> None:
        with aside(self.path) as part:
            part.write_text(
                json.dumps({"drawn": self.drawn, "calls": self.calls, "seconds": self.seconds}) + "\n", encoding="utf-8"
            )
