"""Features of N images on disk, for the metrics that need every image: KID, PRDC, neighbours, per-class distances.

A bank is a folder. While it grows it holds shards, ``shard-<first>-<last>.safetensors``, each written aside and renamed, so an
interrupted run goes on with the images that are missing. ``assemble`` merges them, however uneven, into

    features.npy [N, d] float32 or float16, memory-mapped      ids.npy [N] int64, ascending
    <column>.npy [N] int64, such as class or prompt            bank.json, written last

Rows are ordered by image id: banks of the same ids pair row by row. float16 halves the file and rounds features to 2^-11.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.stats import Stats
from fastdiff.files import aside

FORMAT = "fastdiff-bank-1"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureBank:
    """An assembled bank: ``features`` is mapped from the file and read when indexed.

    >>> bank = FeatureBank.open("bank")
    >>> bank.features[bank.rows("class", 3)]                # numpy [n, d]
    >>> bank.stats()                                       # equals streaming over the same features
    """

    features: np.ndarray
    ids: Tensor
    extractor: str
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureBank":
        """Map the bank in ``folder``; ``UserError`` when it is not assembled or its files do not fit together."""
        path = Path(folder)
        header = path / "bank.json"
        if not header.is_file():
            shards = len(list(path.glob("shard-*.safetensors")))
            raise UserError(f"{path} is no feature bank: it has no bank.json and {shards} shards. Call assemble on it first.")
        facts = json.loads(header.read_text())
        if facts.get("format") != FORMAT:
            raise UserError(f"{header} says format {facts.get('format')!r}: expected {FORMAT!r}.")
        features = np.load(path / "features.npy", mmap_mode="r")
        if list(features.shape) != [facts["n"], facts["dim"]]:
            raise UserError(
                f"{path}/features.npy is {features.shape}, but bank.json says {facts['n']} x {facts['dim']}: assemble it again."
            )
        columns = {name: torch.from_numpy(np.load(path / f"{name}.npy")) for name in ("ids", *facts["columns"])}
        return cls(features=features, ids=columns.pop("ids"), extractor=facts["extractor"], columns=columns)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, column: str, value: int) -> np.ndarray:
        """The rows whose ``column`` (class, prompt) is ``value``, ascending."""
        if column not in self.columns:
            raise UserError(f"the bank has no column {column!r}: it has {', '.join(self.columns) or 'none'}.")
        return (self.columns[column] == value).nonzero()[:, 0].numpy()

    def blocks(self, size: int = 4096) -> Iterator[Tensor]:
        """All features in order as float32 blocks [<= size, d]."""
        for start in range(0, len(self), size):
            yield torch.from_numpy(np.array(self.features[start : start + size], dtype=np.float32))

    def stats(self, rows: np.ndarray | None = None) -> Stats:
        """Their statistics, or those of some ``rows``."""
        blocks = self.blocks() if rows is None else iter([torch.from_numpy(np.array(self.features[rows], dtype=np.float32))])
        stats = Stats.of(next(blocks), extractor=self.extractor)
        for block in blocks:
            stats = stats.update(block)
        return stats


def write_shard(
    folder: str | Path,
    ids: Tensor,
    features: Tensor,
    *,
    extractor: str,
    columns: Mapping[str, Tensor] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write features [n, d] of the images ``ids`` [n] as one shard.

    Raises:
        UserError: lengths differ, features are not finite, or float16 cannot hold them.
    """
    named = {"ids": ids, **(columns or {})}
    if dtype not in DTYPES:
        raise UserError(f"a bank holds {' or '.join(DTYPES)}, not {dtype}.")
    if features.ndim != 2 or any(column.shape != features.shape[:1] for column in named.values()) or not len(ids):
        shapes = {name: tuple(column.shape) for name, column in named.items()}
        raise UserError(f"features have shape {tuple(features.shape)} and columns {shapes}: expected [n, d] and n values each.")
    stored = features.detach().cpu().to(DTYPES[dtype]).contiguous()
    if not stored.isfinite().all():
        bad = (~stored.isfinite().all(dim=1)).sum().item()
        raise UserError(f"{bad} of {len(ids)} feature rows are not finite in {dtype}: broken images, or take dtype='float32'.")
    tensors = {"features": stored} | {name: column.detach().cpu().long().contiguous() for name, column in named.items()}
    path = Path(folder) / f"shard-{int(ids.min()):09d}-{int(ids.max()):09d}.safetensors"
    with aside(path) as part:
        save_file(tensors, part, metadata={"format": FORMAT, "extractor": extractor})
    return path


def assemble(folder: str | Path, *, n: int | None = None, keep_shards: bool = False) -> FeatureBank:
    """Merge all shards of ``folder`` into one bank.

    Args:
        n: the number of images there must be; the shards are left alone when some are missing.

    An id that occurs twice (a padded last batch) counts once. ``UserError`` when its features differ: shards that were numbered
    from 0 each would otherwise lose images in silence.
    """
    path = Path(folder)
    shards = [_Shard(file) for file in sorted(path.glob("shard-*.safetensors"))]
    if not shards:
        raise UserError(f"{path} has no shards to assemble.")
    for shard in shards[1:]:
        shards[0].check(shard)
    ids, order = np.unique(np.concatenate([shard.ids for shard in shards]), return_index=True)
    if n is not None and len(ids) != n:
        raise UserError(f"{path} has the features of {len(ids)} of {n} images: extract the missing ones first.")
    header = path / "bank.json"
    header.unlink(missing_ok=True)
    with aside(path / "features.npy") as part:
        out = np.lib.format.open_memmap(part, mode="w+", dtype=shards[0].dtype, shape=(len(ids), shards[0].dim))
        seen = np.zeros(len(ids), dtype=bool)
        for shard in shards:
            features, rows = shard.features(), np.searchsorted(ids, shard.ids)
            first = ~seen[rows] & _first(rows)
            out[rows[first]] = features[first]
            if not np.allclose(out[rows], features, rtol=1e-2, atol=1e-3):
                raise UserError(
                    f"{shard.path} repeats image ids of another shard with other features: number images over all shards."
                )
            seen[rows] = True
        out.flush()
        del out
    for name in shards[0].columns:
        with aside(path / f"{name}.npy") as part:
            np.save(part, np.concatenate([shard.column(name) for shard in shards])[order])
    columns = [name for name in shards[0].columns if name != "ids"]
    facts = {"format": FORMAT, "extractor": shards[0].extractor, "n": len(ids), "dim": shards[0].dim, "columns": columns}
    with aside(header) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n")
    if not keep_shards:
        for shard in shards:
            shard.path.unlink()
    return FeatureBank.open(path)


def missing(folder: str | Path, n: int) -> Tensor:
    """The ids in 0..n-1 that neither the bank nor its shards hold, ascending."""
    path, there = Path(folder), torch.zeros(n, dtype=torch.bool)
    found = [torch.from_numpy(_Shard(file).ids) for file in path.glob("shard-*.safetensors")]
    if (path / "bank.json").is_file():
        found.append(FeatureBank.open(path).ids)
    for ids in found:
        there[ids[ids < n]] = True
    return (~there).nonzero()[:, 0]


def extract(
    folder: str | Path,
    extractor: FeatureExtractor,
    images: Callable[[Tensor], Tensor],
    n: int,
    *,
    columns: Mapping[str, Tensor] | None = None,
    dtype: str = "float32",
    shard_size: int = 1024,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the shards of all images of 0..n-1 that ``folder`` misses; ``assemble`` comes after, in one process.

    Args:
        images: ids [b] to images [b, 3, H, W] in [0, 1]; called with at most ``shard_size`` ids.
        columns: values of all n images, such as ``{"class": labels}``.
        rank, world_size: each process takes every ``world_size``-th shard, and none pads.
    """
    todo = torch.zeros(n, dtype=torch.bool)
    todo[missing(folder, n)] = True
    for block in torch.arange(n).split(shard_size)[rank::world_size]:  # fixed, however far the other processes are
        part = block[todo[block]]
        if not len(part):
            continue
        features = extractor.features(images(part), batch_size=batch_size, progress=progress)
        own = {name: values[part] for name, values in (columns or {}).items()}
        write_shard(folder, part, features, extractor=extractor.id, columns=own, dtype=dtype)


def _first(rows: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(rows), dtype=bool)
    mask[np.unique(rows, return_index=True)[1]] = True
    return mask


class _Shard:
    """A shard's ids and header; its features are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is no shard of a feature bank: its header says {metadata}.")
            self.extractor, self.columns = metadata["extractor"], [name for name in file.keys() if name != "features"]  # noqa: SIM118
            self.ids = file.get_tensor("ids")
            described = file.get_slice("features")
            self.dim, self.dtype = described.get_shape()[1], {"F32": np.float32, "F16": np.float16}[described.get_dtype()]

    def column(self, name: str) -> np.ndarray:
        with safe_open(self.path, framework="np") as file:
            return file.get_tensor(name)

    def features(self) -> np.ndarray:
        return self.column("features")

    def check(self, other: "_Shard") -> None:
        for fact in ("extractor", "dim", "dtype", "columns"):
            ours, theirs = getattr(self, fact), getattr(other, fact)
            if ours != theirs:
                raise UserError(
                    f"{self.path.name} and {other.path.name} differ in {fact}: {ours!r} and {theirs!r}. "
                    "Shards of one bank come from one extractor; delete those that do not belong."
                )
