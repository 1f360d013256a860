"""Compute what the evaluation of the bundled world compares with, so that it needs no data set.

``fashion-reference.safetensors``: statistics of the classifier's features over the 10,000 photographs of the test
split, each once, in random colours (seed 1). ``fashion-real.safetensors``: the first 250 photographs a garment of the
same split, grey, 28x28, for the row of real images, which colours them as the prompts ask.
``fashion-reference-features.safetensors``: features [7500, 32] in float16 and garments of the photographs that are not in that
bank, for the scores that need features of their own: kernel distance, precision and its kin, each garment's distance.

python trainers/fashion_statistics.py --output fastdiff/assets
"""

from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file

from fastdiff.data.fashion import ASSETS, GARMENTS, Coloured
from fastdiff.eval.classifier import WEIGHTS, FashionClassifier
from fastdiff.eval.fashion import FEATURES, REAL, REFERENCE, extractor_name, features
from fastdiff.eval.stats import Stats
from fastdiff.files import aside


def main(output: Path = ASSETS, classifier: Path = WEIGHTS, per_garment: int = 250, seed: int = 1) -> None:
    network, data = FashionClassifier.load(classifier), Coloured("t10k")
    generator, stats, rows = torch.Generator().manual_seed(seed), None, []
    for index in torch.arange(len(data)).split(500):
        found = features(data.pick(index, generator)[0], network)
        rows.append(found)
        stats = stats.update(found) if stats else Stats.of(found, extractor=extractor_name(network))
    assert stats is not None
    stats.save(output / REFERENCE.name)

    index = torch.cat([(data.labels == g).nonzero()[:per_garment, 0] for g in range(len(GARMENTS))])
    grey = data.grey[index, 2:-2, 2:-2].contiguous()
    with aside(output / REAL.name) as part:
        save_file({"grey": grey, "garment": data.labels[index].to(torch.uint8)}, part)
    others = torch.ones(len(data), dtype=torch.bool)
    others[index] = False
    with aside(output / FEATURES.name) as part:
        save_file({"features": torch.cat(rows)[others].half(), "garment": data.labels[others].to(torch.uint8)}, part)
    print(f"{stats.n} images of {stats.extractor} and a bank of {len(index)} photographs in {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
