"""``fastdiff eval stats IMAGES --output FILE.npz``: reference statistics of a folder of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastdiff.cli.options import parse


@dataclass(kw_only=True)
class Options:
    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of reference images; subfolders are looked into."""
    output: Annotated[Path, tyro.conf.arg(metavar="NPZ")]
    """File to write: mu, sigma and its root, n, and a header that says what they are of."""
    protocol: str = ""
    """Take extractor and preprocess from a protocol, by name or TOML file."""
    extractor: str = "inception-2015"
    """The extractor, where no protocol names it."""
    preprocess: str = "clean"
    """Its crop, resize and rounding, where no protocol names them."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights of the extractor, where it takes a file or folder."""
    workers: int = 2
    """Processes that decode and resize."""
    batch_size: int = 32
    """Images a call of the network."""


def run(argv: Sequence[str]) -> int:
    """Extract, write, say what of."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="eval stats", description="Reference statistics of a folder of images.")
    from tqdm import tqdm

    from fastdiff.eval.images import ImageFolder, features_of_folder
    from fastdiff.eval.instruments import open_extractor
    from fastdiff.eval.protocol import Protocol
    from fastdiff.eval.reference import write_reference
    from fastdiff.eval.stats import Stats

    if chosen.protocol:
        protocol = Protocol.load(chosen.protocol)
    else:
        protocol = Protocol(
            name="eval stats", n=2, prompts="-", preprocess=chosen.preprocess, extractor=chosen.extractor, reference="-"
        )
    folder = ImageFolder(chosen.images)
    extractor = open_extractor(protocol, weights=chosen.weights, reference=True)
    with tqdm(total=len(folder), unit="img", desc=extractor.id) as bar:
        features = features_of_folder(folder, extractor, workers=chosen.workers, batch_size=chosen.batch_size, progress=bar.update)
    compared = open_extractor(protocol, weights=chosen.weights).id  # of the images that these will be compared with
    facts = {"preprocess": extractor.preprocess.id, "protocol": protocol.name}
    write_reference(chosen.output, Stats.of(features, extractor=compared), source=folder.source, **facts)
    print(f"{len(folder)} images of {chosen.images} by {extractor.id}: {chosen.output.with_suffix('.npz')}")
    return 0
