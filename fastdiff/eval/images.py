"""Image files as they are, and their features, with decode and resize in worker processes.

Decode and resize cost more than the network on a GPU: both happen per image in ``workers`` processes, and the main process
runs the network. The workers write into memory that is shared once and used again, (2 workers + 1) batches of it, because new
shared pages for every batch cost as much as the resize itself.

>>> folder = ImageFolder("photographs")
>>> features_of_folder(folder, load_extractor("inception-2015"), workers=2, batch_size=32)      # [N, 2048]
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdiff.errors import UserError
from fastdiff.eval.bank import FeatureBank, assemble, missing, write_shard
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.looks import WIDTH, looks
from fastdiff.eval.reference import source_hash
from fastdiff.files import aside

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES = ("RGB", "L", "P", "1", "CMYK")  # what converts to 8-bit RGB without loss of range
_SHARD = 1024
_AHEAD = 2  # batches that a worker may be ahead


class ImageFolder:
    """The images under ``path`` in natural order (``2.png`` before ``10.png``), the same on every machine.

    Args:
        path: a folder; files whose name begins with a dot are passed over.
        recursive: look into subfolders too.

    Grey images become RGB. An alpha channel or more than 8 bits a channel is a ``UserError`` that names the file. The rotation
    that a camera noted in EXIF is not applied, as in clean-fid.

    >>> ImageFolder("photographs")(torch.tensor([0, 1]))            # [2, 3, H, W] in [0, 1]
    """

    def __init__(self, path: str | Path, *, recursive: bool = True) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no folder of images.")
        found = self.path.rglob("*") if recursive else self.path.iterdir()
        kept = [file for file in found if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()]
        if not kept:
            raise UserError(f"{self.path} holds no image: expected {', '.join(SUFFIXES)}.")
        self.files = sorted(kept, key=lambda file: [_natural(part) for part in file.relative_to(self.path).parts])
        parts = [file.relative_to(self.path).parts for file in self.files]
        names = [part[0] for part in parts] if all(len(part) > 1 for part in parts) else []
        self.classes = list(dict.fromkeys(names))
        """Names of the subfolders of ``path`` in order, when every image lies in one; otherwise none."""
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for name in names]) if names else None
        """[N] int64: each image's place in ``classes``; None without classes."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def source(self) -> str:
        """SHA-256 of all files and their names (``source_hash``); they are read for it each time."""
        return source_hash(self.files, self.path)

    def levels(self, i: int) -> Tensor:
        """Image ``i`` as whole levels [3, H, W] in [0, 255], float32, a view of [H, W, 3]."""
        file = self.files[i]
        try:
            with Image.open(file) as image:
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    raise UserError(f"{file} has an alpha channel: composite it on a background first.")
                if image.mode not in _MODES or any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])):
                    raise UserError(f"{file} ({image.mode}) has more than 8 bits a channel, which PIL cuts off: convert it first.")
                pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
            raise UserError(f"{file} cannot be decoded: {error}") from error
        return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)

    def __call__(self, ids: Tensor) -> Tensor:
        """Images ``ids`` [b] as [b, 3, H, W] in [0, 1]; ``UserError`` that names two files when their sizes differ."""
        rows = ids.tolist()
        images = [self.levels(i) for i in rows]
        for i, image in zip(rows, images, strict=True):
            _same_size(images[0], image, self.files[rows[0]], self.files[i])
        return torch.stack(images) / 255


def features_of_folder(
    folder: ImageFolder | str | Path,
    extractor: FeatureExtractor,
    *,
    workers: int = 2,
    batch_size: int = 32,
    bank: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    looked: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Features [N, dim] of all images in the order of ``folder.files``, on the CPU; equal to ``extractor.features`` of them.

    Args:
        workers: processes that decode and resize; 0 does it here.
        batch_size: images a call of the network. Shared memory holds (2 workers + 1) batches of its input in float32.
        bank: a folder that keeps them as a ``FeatureBank`` with the column ``class``; an interrupted run goes on there.
        progress: called with the number of images just done.
        looked: called with the ``looks`` [b, 72] of the images just done, as their files are; the workers make them.

    Images may differ in size where the preprocess resizes. ``UserError`` for files that cannot be used, or a bank of other
    images or of another extractor.
    """
    images = folder if isinstance(folder, ImageFolder) else ImageFolder(folder)

    def extracted(ids: Tensor) -> Iterator[Tensor]:
        for levels in prepared(images, extractor, ids, workers=workers, batch_size=batch_size, looked=looked):
            yield extractor.of_levels(levels).cpu()
            if progress:
                progress(len(levels))

    if bank is None:
        return torch.cat(list(extracted(torch.arange(len(images)))))
    path = _bank_of(images, extractor, Path(bank))
    todo = missing(path, len(images))
    if len(todo):
        _write(path, todo, extracted(todo), images.labels, extractor.id)
        assemble(path, n=len(images))
    return torch.cat(list(FeatureBank.open(path).blocks()))


def prepared(
    folder: ImageFolder,
    extractor: FeatureExtractor,
    ids: Tensor,
    *,
    workers: int = 2,
    batch_size: int = 32,
    looked: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Batches of the network's input [b, 3, h, w] of the images ``ids``, in order; each is overwritten after the next is taken."""
    slots = min(_AHEAD * workers + 1, -(-len(ids) // batch_size))
    dataset, free = _Prepared(folder, extractor, int(ids[0])), deque(range(slots))
    dataset.buffers = torch.empty(slots, min(batch_size, len(ids)), *dataset.row(dataset.first).shape)
    dataset.looks = torch.empty(slots, min(batch_size, len(ids)), 0 if looked is None else WIDTH, dtype=torch.float64)
    if workers:
        dataset.buffers.share_memory_()
        dataset.looks.share_memory_()

    def tasks() -> Iterator[tuple[int, list[int]]]:
        for part in ids.split(batch_size):
            yield free.popleft(), part.tolist()  # raises, rather than overwrite a batch, if the loader ran further ahead

    options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": _AHEAD if workers else None, "sampler": tasks()}
    loader = DataLoader(dataset, batch_size=None, worker_init_fn=_keep_pages, generator=torch.Generator(), **options)
    for slot, count, error in loader:
        if error is not None:
            raise error
        if looked is not None:
            looked(dataset.looks[slot, :count].clone())
        yield dataset.buffers[slot, :count]
        free.append(slot)


class _Prepared(Dataset[tuple[int, int, UserError | None]]):
    """Fills a slot of ``buffers`` [slots, b, 3, h, w] with the images of a task; errors come back whole, not as a traceback.

    ``looks`` [slots, b, 72] is filled too, unless it has no columns.
    """

    buffers: Tensor
    looks: Tensor

    def __init__(self, folder: ImageFolder, extractor: FeatureExtractor, first: int) -> None:
        self.folder, self.preprocess, self.size, self.first = folder, extractor.preprocess, extractor.size, first

    def row(self, i: int, look: Tensor | None = None) -> Tensor:
        levels = self.folder.levels(i)
        if look is not None and len(look):
            look.copy_(looks(levels[None] / 255)[0])
        try:
            return self.preprocess.resize(levels[None], self.size)[0]
        except ValueError as error:
            raise UserError(f"{self.folder.files[i]}: {error}") from error

    def __getitem__(self, task: tuple[int, list[int]]) -> tuple[int, int, UserError | None]:
        slot, ids = task
        try:
            for target, look, i in zip(self.buffers[slot], self.looks[slot], ids, strict=False):
                found = self.row(i, look)
                _same_size(target, found, self.folder.files[self.first], self.folder.files[i])
                target.copy_(found)
        except UserError as error:
            return slot, 0, error
        return slot, len(ids), None


def _keep_pages(_worker: int) -> None:
    """glibc gives no freed block back that is smaller than the largest mapped one freed before: images then reuse their pages."""
    np.empty(31 * 2**20, dtype=np.uint8)


def _same_size(expected: Tensor, found: Tensor, first: Path, second: Path) -> None:
    if expected.shape != found.shape:
        sizes = " and ".join(f"{t.shape[1]}x{t.shape[2]}" for t in (expected, found))
        raise UserError(f"{first} and {second} are {sizes} (height x width): name a preprocess that resizes, or resize the files.")


def _natural(name: str) -> tuple[list[Any], str]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def _bank_of(folder: ImageFolder, extractor: FeatureExtractor, path: Path) -> Path:
    """``path``, whose ``source.txt`` says which images and which extractor its features are of."""
    stamp, source = path / "source.txt", f"{folder.source} {extractor.id}\n"
    if stamp.is_file() and stamp.read_text() != source:
        raise UserError(f"{path} keeps features of other images or of another extractor than {extractor.id}: take a new folder.")
    with aside(stamp) as part:
        part.write_text(source)
    return path


def _write(path: Path, ids: Tensor, batches: Iterable[Tensor], labels: Tensor | None, extractor: str) -> None:
    """Features of the images ``ids``, in shards of about ``_SHARD``."""
    waiting: list[Tensor] = []
    done = 0
    for batch in batches:
        waiting.append(batch)
        count = sum(map(len, waiting))
        if count >= _SHARD or done + count == len(ids):
            own = ids[done : done + count]
            columns = {} if labels is None else {"class": labels[own]}
            write_shard(path, own, torch.cat(waiting), extractor=extractor, columns=columns)
            waiting, done = [], done + count
