"""The bundled world: coloured garments with captions.

Fashion-MNIST (60,000 + 10,000 grey 28x28 photographs, MIT licence) padded to 32x32; the grey value g blends a named foreground
colour over a named background colour, ``pixel = background + g (foreground - background)``, and the caption says which:
``a red boot on a white background``. 10 garments x 8 foregrounds x 7 other backgrounds = 560 captions.

The colours sit near the corners of the RGB cube, so that no three of them are collinear: from a given background every
foreground lies in its own direction, and pixel statistics can tell them apart exactly (``fastdiff.eval.attributes``).
"""

import gzip
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.models.tokenizers import add_slow_files

ASSETS = Path(__file__).parent.parent / "assets"
COLOURS = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "red": (220, 35, 35),
    "green": (35, 180, 60),
    "blue": (35, 60, 220),
    "yellow": (240, 220, 40),
    "cyan": (40, 210, 220),
    "pink": (235, 60, 200),
}
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
TEMPLATE = "a {foreground} {garment} on a {background} background"
_CAPTION = re.compile(r"a (?P<foreground>\S+) (?P<garment>\S+) on a (?P<background>\S+) background")
_PLACES = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")


@dataclass(frozen=True)
class Attributes:
    """What a caption asks for, as indices into ``GARMENTS`` and ``COLOURS``."""

    garment: int
    foreground: int
    background: int

    @property
    def caption(self) -> str:
        names = list(COLOURS)
        return TEMPLATE.format(foreground=names[self.foreground], garment=GARMENTS[self.garment], background=names[self.background])


def parse(caption: str) -> Attributes:
    """The attributes of a caption; ``ValueError`` when it is not one of the 560."""
    match, names = _CAPTION.fullmatch(caption), list(COLOURS)
    if match is None or match["garment"] not in GARMENTS or not {match["foreground"], match["background"]} <= set(names):
        raise ValueError(f"{caption!r} is no caption of the fashion world: expected {TEMPLATE!r} with {GARMENTS} and {names}.")
    if match["foreground"] == match["background"]:
        raise ValueError(f"{caption!r} is no caption of the fashion world: nothing shows on its own colour.")
    return Attributes(GARMENTS.index(match["garment"]), names.index(match["foreground"]), names.index(match["background"]))


def captions() -> list[str]:
    """All 560 captions, in a fixed order."""
    n = len(COLOURS)
    return [Attributes(g, f, b).caption for g in range(len(GARMENTS)) for f in range(n) for b in range(n) if f != b]


def random_captions(n: int, seed: int) -> list[str]:
    """``n`` captions that run through a shuffled list of all 560 again and again, so that classes and colours stay balanced."""
    every, generator = captions(), torch.Generator().manual_seed(seed)
    rounds = -(-n // len(every))
    order = torch.cat([torch.randperm(len(every), generator=generator) for _ in range(rounds)])
    return [every[i] for i in order[:n].tolist()]


def palette() -> Tensor:
    """The colours as float32 [8, 3] in [0, 1]."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255


def colourise(grey: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Blend: grey [B, H, W] in [0, 1] and colour indices [B], [B] to RGB [B, 3, H, W] in [0, 1]."""
    colours = palette()
    fg, bg = colours[foreground][..., None, None], colours[background][..., None, None]
    return bg + grey[:, None] * (fg - bg)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file, gzipped or not, of unsigned bytes."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4]!r}.")
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load(split: str, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Grey images uint8 [N, 32, 32] and labels int64 [N] of ``split`` ("train" or "t10k").

    Looks in ``root``, then where Debian's ``dataset-fashion-mnist`` puts the files; with ``datasets`` installed and no
    local files, takes ``zalando-datasets/fashion_mnist`` from the hub.
    """
    for place in [root] if root else _PLACES:
        for suffix in (".gz", ""):
            images = Path(place) / f"{split}-images-idx3-ubyte{suffix}"
            labels = Path(place) / f"{split}-labels-idx1-ubyte{suffix}"
            if images.exists() and labels.exists():
                return _pad(read_idx(images)), torch.from_numpy(read_idx(labels).astype(np.int64))
    if root is None:
        return _from_hub(split)
    raise FileNotFoundError(f"no {split}-images-idx3-ubyte[.gz] in {root}: `apt-get install dataset-fashion-mnist` brings it.")


def _from_hub(split: str) -> tuple[Tensor, Tensor]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is in none of {_PLACES} and the package `datasets` is not installed: run "
            "`apt-get install dataset-fashion-mnist`, or pass the folder of the four IDX files."
        ) from error
    rows = load_dataset("zalando-datasets/fashion_mnist", split={"train": "train", "t10k": "test"}[split])
    return _pad(np.stack([np.asarray(i) for i in rows["image"]])), torch.tensor(rows["label"])


def _pad(images: np.ndarray) -> Tensor:
    return torch.nn.functional.pad(torch.from_numpy(images.copy()), (2, 2, 2, 2))


class Coloured:
    """A split with colours drawn at random: endless captioned batches, or one fixed image per photograph.

    >>> images, labels, texts = Coloured("train").batch(64, torch.Generator().manual_seed(0))   # images [64, 3, 32, 32] in [0, 1]
    """

    def __init__(self, split: str, root: str | Path | None = None) -> None:
        self.grey, self.labels = load(split, root)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """``size`` random photographs in random colours: RGB in [0, 1], labels, captions."""
        return self.pick(torch.randint(len(self), (size,), generator=generator), generator)

    def pick(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """The photographs ``index`` [B] in random colours."""
        n = len(COLOURS)
        fg = torch.randint(n, index.shape, generator=generator)
        bg = (fg + torch.randint(1, n, index.shape, generator=generator)) % n
        labels = self.labels[index]
        texts = [Attributes(*a).caption for a in zip(labels.tolist(), fg.tolist(), bg.tolist(), strict=True)]
        return colourise(self.grey[index].float() / 255, fg, bg), labels, texts


@cache
def vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """CLIP vocabulary and merges under which each word of the world is one token; the end token has the largest id."""
    words = sorted({w for text in captions() for w in re.split(r"[\s-]+", text)})
    base = [chr(c) for c in range(33, 127)]
    base += [c + "</w>" for c in base]
    merges: dict[tuple[str, str], None] = {}
    merged: dict[str, None] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[(parts[0], parts[1])] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in base:
                merged[parts[0]] = None
    tokens = [*base, *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, tuple(merges)


def tokenizer() -> Any:
    """The ``CLIPTokenizer`` of the world: 16 tokens, padded with the end token."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=16)


def save_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 load it."""
    tokenizer().save_pretrained(folder)
    add_slow_files(folder)


def gemma_tokenizer() -> Any:
    """A ``GemmaTokenizer`` under which each word of the world is one token, and all text between such words is one more.

    A caption is seven of them; the window of 32 has room for the instruction of SANA's pipeline too, which is 18.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken, GemmaTokenizer

    words = sorted({word for text in captions() for word in text.split()})
    made = GemmaTokenizer(model_max_length=32)
    made.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in words])
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{made.bos_token} $A", special_tokens=[(made.bos_token, made.bos_token_id)]
    )
    return made
