"""Score a folder of images by what people prefer: one JSON row of means and standard errors.

The captions' file has one line an image, in the order of the images' names. Weights: FASTDIFF_WEIGHTS, the caches, or
--allow-download.

python eval/preference.py runs/images captions.txt --scores pickscore hpsv2.1 --output runs/preference.json
"""

import json
from pathlib import Path

import tyro

from fastdiff.eval.preferences import folder_row, load_preference
from fastdiff.files import aside


def main(
    images: tyro.conf.Positional[Path],
    captions: tyro.conf.Positional[Path],
    scores: tuple[str, ...] = ("pickscore", "hpsv2.1", "imagereward", "aesthetic"),
    output: Path | None = None,
    device: str = "cpu",
    allow_download: bool = False,
) -> None:
    loaded = [load_preference(name, device=device, allow_download=allow_download) for name in scores]
    row = json.dumps(folder_row(images, captions, loaded), indent=2, allow_nan=False)
    print(row)
    if output:
        with aside(output) as part:
            part.write_text(row + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
