"""Features of a folder of PNGs: images a second beside clean-fid's, with the ``clean`` preprocess on both sides.

Both run through their public function (``features_of_folder``, ``cleanfid.fid.get_folder_features``) with the same files,
workers, batch size and network, in turn inside one process; which is first alternates. Two networks a size:

    averages     means of 13 x 13 squares, which cost next to nothing: decode, resize and transport alone
    inception    the architecture of 2015 with random weights, batch norm fitted to the pictures: the same time on both sides

Wall seconds depend on who else uses the machine; ``cpu_seconds`` are those of the process and its workers together. The
pictures have the spectrum of photographs and noise of one level; ``n`` files are links to ``distinct`` of them.

pip install clean-fid && python eval/bench_folder.py --n 5000 --json-path docs/results/bench_folder.json
"""

import json
import os
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
from fastdiff.eval.report import environment
from fastdiff.files import aside


def picture(side: int, seed: int) -> Image.Image:
    """Correlated fields of amplitude 1 / frequency^1.3, and noise of one level."""
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
    """``n`` PNGs that are links to ``distinct`` pictures; bytes a sample of the files."""
    folder.mkdir()
    for i in range(n):
        file = folder / f"{i}.png"
        if i < distinct:
            picture(side, i).save(file)
        else:
            file.hardlink_to(folder / f"{i % distinct}.png")
    return statistics.mean(file.stat().st_size for file in folder.iterdir()) / (3 * side**2)


class Averages(nn.Module):
    """Levels [B, 3, 299, 299] to the 3 x 23 x 23 means of squares."""

    def forward(self, levels: Tensor) -> Tensor:
        return F.avg_pool2d(levels, 13).flatten(1)


class Levels(nn.Module):
    """Levels [B, 3, 299, 299] to Inception's pool, its batch norm fitted to eight pictures so that activations stay alive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Inception()
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        pictures = torch.stack([torch.from_numpy(np.array(picture(299, -i - 1 + 10**6))) for i in range(8)])
        with torch.no_grad():
            self.network.train()((pictures.permute(0, 3, 1, 2).float() - 128) / 128)

    def forward(self, levels: Tensor) -> Tensor:
        return self.network((levels - 128) / 128).flatten(1)


def compare(facts: dict[str, Any], ours: Callable[[], Any], theirs: Callable[[], Any], n: int, pairs: int) -> dict[str, Any]:
    """Both in turn, ``pairs`` times: raw seconds, the medians of the paired ratios of images a second, the largest difference."""
    wall: dict[str, list[float]] = {"ours": [], "clean-fid": []}
    cpu: dict[str, list[float]] = {"ours": [], "clean-fid": []}
    found: dict[str, np.ndarray] = {}
    for i in range(pairs):
        both = [("ours", ours), ("clean-fid", theirs)]
        for name, action in both[:: 1 if i % 2 == 0 else -1]:
            start, used = time.perf_counter(), sum(os.times()[:4])
            found[name] = np.asarray(action())
            wall[name].append(round(time.perf_counter() - start, 3))
            cpu[name].append(round(sum(os.times()[:4]) - used, 2))  # the workers have been joined: theirs are in
    ratios, work = ([b / a for a, b in zip(s["ours"], s["clean-fid"], strict=True)] for s in (wall, cpu))
    row = {
        **facts, "images": n, "seconds": wall, "cpu_seconds": cpu,
        "images_per_s": {name: round(n / statistics.median(values), 1) for name, values in wall.items()},
        "median_ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_median_ratio": round(statistics.median(work), 3),
        "largest_difference": float(np.abs(found["ours"] - found["clean-fid"]).max()),
        "feature_sd": float(found["ours"].std()),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main(
    n: int = 1000, inception_n: int = 64, sides: tuple[int, ...] = (256, 512), workers: int = 2, batch_size: int = 32,
    pairs: int = 3, distinct: int = 200, json_path: Path | None = None,
) -> None:  # fmt: skip
    """Measure, print a JSON line a case, and write all of them."""
    from cleanfid.fid import get_folder_features

    options: dict[str, Any] = {"preprocess": Preprocess("clean"), "size": (299, 299)}
    cases = (
        (FeatureExtractor(name="averages", network=Averages(), dim=3 * 23**2, **options), n),
        (FeatureExtractor(name="inception", network=Levels(), dim=2048, **options), inception_n),
    )
    rows = []
    for side in sides:
        for extractor, count in cases:
            with tempfile.TemporaryDirectory() as work:
                folder, network = Path(work) / "images", extractor.network
                facts = {"network": extractor.name, "side": side, "workers": workers, "batch_size": batch_size}
                facts["bytes_a_sample"] = round(write_folder(folder, side, count, distinct), 3)
                files = sorted(map(str, ImageFolder(folder).files))  # clean-fid's order, which is not the natural one
                natural = [files.index(str(file)) for file in ImageFolder(folder).files]

                def ours(path: Path = folder, chosen: FeatureExtractor = extractor) -> Tensor:
                    return features_of_folder(path, chosen, workers=workers, batch_size=batch_size)

                def theirs(path: Path = folder, chosen: nn.Module = network, order: list[int] = natural) -> np.ndarray:
                    shared: dict[str, Any] = {"num_workers": workers, "batch_size": batch_size, "device": "cpu"}
                    return get_folder_features(str(path), chosen, verbose=False, **shared)[order]

                rows.append(compare(facts, ours, theirs, count, pairs))
    if json_path:
        with aside(json_path) as target:
            target.write_text(json.dumps({"environment": environment(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
