"""What a benchmark wants drawn, and the drawing of it: resumable, and the same images however often it was interrupted.

Image i of a plan is drawn from a generator of its own, of seed and i, so neither batches nor what is already there move it.
``<folder>.export.json`` beside the folder records what its images are of: a second run of the same goes on where the first
stopped, a run of anything else is refused, as a folder with images of two models scores as neither.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.report import eight_bit
from fastdiff.eval.subject import Subject, checked
from fastdiff.files import aside

_NAME_BYTES = 249  # 255 on common file systems, less the six that a file being written has more


@dataclass(frozen=True)
class Piece:
    """One file: where it goes in the folder, its prompt, and the numbers of the images in it."""

    path: str
    prompt: str
    indices: tuple[int, ...]


def save_png(images: Tensor, path: Path) -> None:
    """The one image of ``images`` [1, 3, H, W] in [0, 1] as an 8-bit PNG."""
    eight_bit(images[0]).save(path, format="PNG")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of a benchmark."""

    benchmark: str
    source_sha256: str
    """Of the prompts' file, or of all prompts."""
    per_prompt: int
    pieces: Sequence[Piece]
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further files in the folder and what stands in them."""
    save: Callable[[Tensor, Path], None] = save_png
    """Writes the images of a piece, [n, 3, H, W], or [n, F, 3, H, W] of a video, to a path."""
    video: bool = False

    def __post_init__(self) -> None:
        if not self.pieces or self.per_prompt < 1:
            raise UserError(f"nothing to draw for {self.benchmark}: no prompts, or {self.per_prompt} images a prompt.")


def export(
    plan: Plan,
    folder: str | Path,
    subject: Subject,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Draw the files of ``plan`` that ``folder`` misses.

    Args:
        subject: draws images [B, 3, H, W]; for a plan of videos [B, F, 3, H, W].
        batch_size: images in memory at a time.
        progress: called with the number of files just written.

    Returns:
        How many files were written.

    Raises:
        UserError: the folder holds images of another subject, seed or prompt file, or the subject draws images for videos.
        ValueError: an image is not finite or leaves [0, 1].
    """
    root = Path(folder).resolve()
    _check_record(plan, root, subject, seed)
    for name, text in plan.texts.items():
        if not (root / name).is_file():
            with aside(root / name) as part:
                part.write_text(text, encoding="utf-8")
    missing = [piece for piece in plan.pieces if not (root / piece.path).is_file()]
    size = max(1, batch_size // len(plan.pieces[0].indices))
    for pieces in (missing[start : start + size] for start in range(0, len(missing), size)):
        prompts = [piece.prompt for piece in pieces for _ in piece.indices]
        drawn = subject.draw(prompts, seed=seed, indices=[i for piece in pieces for i in piece.indices])
        for piece, images in zip(pieces, _checked(drawn, len(prompts), plan, subject).split(len(pieces[0].indices)), strict=True):
            with aside(root / piece.path) as part:
                plan.save(images, part)
        if progress:
            progress(len(pieces))
    return len(missing)


def file_name(prompt: str, ending: str, *, benchmark: str) -> str:
    """``prompt`` and ``ending`` as they stand; ``UserError`` when no file can be called so.

    The scorers read the prompt off the name, so a shortened or escaped one would be scored against other words.
    """
    name = f"{prompt}{ending}"
    if not prompt.strip() or any(character in prompt for character in "/\0\n\r"):
        raise UserError(f"{benchmark} reads prompts off file names: {prompt!r} is empty or holds a slash or line break.")
    if len(name.encode()) > _NAME_BYTES:
        raise UserError(
            f"{benchmark} reads prompts off file names, and {prompt[:40]!r}... makes one of {len(name.encode())} bytes, over "
            f"{_NAME_BYTES}: shorten the prompt in its file."
        )
    return name


def read_text(source: str | Path, what: str) -> str:
    """The text of a prompts' file; ``UserError`` when there is none."""
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}. Pass {what}.") from error


def digest(text: str) -> str:
    """SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(drawn: Tensor, n: int, plan: Plan, subject: Subject) -> Tensor:
    if not plan.video:
        return checked(drawn, n, subject.name)
    if drawn.ndim != 5:
        shape = tuple(drawn.shape[1:])
        raise UserError(f"{subject.name} draws images {shape}, and {plan.benchmark} scores motion: pass a subject of videos.")
    frames = drawn.shape[1]
    return checked(drawn.flatten(0, 1), n * frames, subject.name).unflatten(0, (n, frames))


def _check_record(plan: Plan, root: Path, subject: Subject, seed: int) -> None:
    own: dict[str, Any] = {
        "benchmark": plan.benchmark,
        "prompts_sha256": plan.source_sha256,
        "per_prompt": plan.per_prompt,
        "subject": subject.name,
        "steps": subject.steps,
        "guidance_scale": subject.guidance_scale,
        "seed": seed,
    }
    path = root.with_name(f"{root.name}.export.json")
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if other := [f"{key} {stored.get(key)!r} and not {value!r}" for key, value in own.items() if stored.get(key) != value]:
            raise UserError(f"{root} holds images of {', '.join(other)} (says {path.name}): export into another folder.")
    elif root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and has no {path.name}: its files would be scored as well. Take another folder.")
    else:
        with aside(path) as part:
            part.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
