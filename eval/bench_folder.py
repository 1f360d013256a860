"""Features of a folder of PNGs: images a second beside clean-fid's, in the ``clean`` preprocess of both.

Both sides run through their public function (``features_of_folder``, ``cleanfid.fid.get_folder_features``) with the same files,
workers, batch size and network, in turn inside one process; which is first alternates. Three cases a size:

    decode + resize     a network that averages over 13 x 13 squares and costs next to nothing: the preprocess alone
    Inception           the architecture of 2015 with random weights: its time is the same on both sides
    cpu                 seconds of processor of one image's decode and resize, without processes: what the work itself costs

The pictures have the spectrum of photographs with a little sensor noise; the bytes of a sample are printed beside.
``files`` copies of ``distinct`` pictures are written, since drawing 5,000 takes longer than reading them.

pip install clean-fid && python eval/bench_folder.py --n 5000 --inception-n 128 --json-path docs/results/bench_folder.json
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.images import ImageFolder, features_of_folder
from fastdiff.eval.inception import Inception
from fastdiff.eval.preprocess import Preprocess
from fastdiff.files import aside


def picture(side: int, seed: int) -> Image.Image:
    """Three correlated fields of amplitude 1 / frequency, and noise of one level."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf

    def field() -> np.ndarray:
        found = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((side, side))) / frequency**1.3, (side, side))
        return found / found.std()

    grey = field()
    levels = np.stack([128 + 45 * grey + 10 * field() + draw.standard_normal((side, side)) for _ in range(3)], axis=-1)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def write_folder(folder: Path, side: int, n: int, distinct: int) -> float:
    """``n`` PNGs of ``distinct`` pictures; bytes a sample of the files."""
    folder.mkdir()
    sizes = []
    for i in range(min(n, distinct)):
        picture(side, i).save(folder / f"{i:05d}.png")
        sizes.append((folder / f"{i:05d}.png").stat().st_size)
    for i in range(distinct, n):
        (folder / f"{i:05d}.png").write_bytes((folder / f"{i % distinct:05d}.png").read_bytes())
    return statistics.mean(sizes) / (3 * side**2)


class Averages(nn.Module):
    """Levels [B, 3, 299, 299] to the 3 x 23 x 23 means of squares."""

    def forward(self, levels: Tensor) -> Tensor:
        return F.avg_pool2d(levels, 13).flatten(1)


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Inception()

    def forward(self, levels: Tensor) -> Tensor:
        return self.network((levels - 128) / 128).flatten(1)


def extractor(name: str, network: nn.Module, dim: int) -> FeatureExtractor:
    return FeatureExtractor(name=name, network=network, preprocess=Preprocess("clean"), dim=dim, size=(299, 299))


def clock(action: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    start = timer()
    value = action()
    return timer() - start, value


def compare(case: dict[str, Any], ours: Callable[[], Any], theirs: Callable[[], Any], n: int, pairs: int) -> dict[str, Any]:
    """Both in turn, ``pairs`` times; the median of the paired ratios of images a second, with all raw seconds."""
    seconds: dict[str, list[float]] = {"ours": [], "clean-fid": []}
    timer = time.process_time if case["case"] == "cpu" else time.perf_counter
    for i in range(pairs):
        both = [("ours", ours), ("clean-fid", theirs)]
        found = {}
        for name, action in both[:: 1 if i % 2 == 0 else -1]:
            taken, found[name] = clock(action, timer)
            seconds[name].append(round(taken, 3))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["clean-fid"], strict=True)]
    difference = np.abs(np.asarray(found["ours"]) - np.asarray(found["clean-fid"])).max()
    row = {
        **case, "images": n, "seconds": seconds,
        "images_per_s": {name: round(n / statistics.median(values), 1) for name, values in seconds.items()},
        "median_ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "largest_difference": float(difference), "largest_feature": float(np.abs(np.asarray(found["ours"])).max()),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def by_hand(folder: ImageFolder) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One process: every image decoded and resized, ours and theirs; the last image is what they are compared by."""
    from cleanfid.utils import ResizeDataset

    dataset, resize = ResizeDataset(folder.files, mode="clean"), Preprocess("clean").resize

    def ours() -> Tensor:
        return [resize(folder.levels(i)[None], (299, 299)) for i in range(len(folder))][-1][0]

    def theirs() -> Tensor:
        return [dataset[i] for i in range(len(folder))][-1]

    return ours, theirs


def main(
    n: int = 1000, inception_n: int = 64, cpu_n: int = 100, sides: tuple[int, ...] = (256, 512), workers: int = 2,
    batch_size: int = 32, pairs: int = 3, distinct: int = 200, json_path: Path | None = None,
) -> None:  # fmt: skip
    """Measure, print a JSON line a case and write them all."""
    from cleanfid.fid import get_folder_features

    stub, network = extractor("averages", Averages(), 3 * 23**2), extractor("inception", Levels(), 2048)
    cases: tuple[tuple[str, FeatureExtractor, int], ...] = (("decode + resize", stub, n), ("inception", network, inception_n))
    rows = []
    for side in sides:
        with tempfile.TemporaryDirectory() as work:
            density = write_folder(Path(work) / "images", side, n, distinct)
            facts = {"side": side, "bytes_a_sample": round(density, 3), "workers": workers, "batch_size": batch_size}
            for name, chosen, count in cases:
                part = Path(work) / name.replace(" ", "")
                part.mkdir()
                for file in ImageFolder(Path(work) / "images").files[:count]:
                    (part / file.name).hardlink_to(file)

                def ours(part: Path = part, chosen: FeatureExtractor = chosen) -> Any:
                    return features_of_folder(part, chosen, workers=workers, batch_size=batch_size)

                def theirs(part: Path = part, chosen: FeatureExtractor = chosen) -> Any:
                    return get_folder_features(
                        str(part), chosen.network, num_workers=workers, batch_size=batch_size, device="cpu", verbose=False
                    )

                rows.append(compare({"case": name, **facts}, ours, theirs, count, pairs))
            few = ImageFolder(part)
            few.files = few.files[:cpu_n]
            rows.append(compare({"case": "cpu", **facts, "workers": 0}, *by_hand(few), len(few), pairs))
    if json_path:
        versions = {"torch": torch.__version__, "pillow": Image.__version__, "threads": torch.get_num_threads()}  # type: ignore[attr-defined]
        with aside(json_path) as target:
            target.write_text(json.dumps({"versions": versions, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
