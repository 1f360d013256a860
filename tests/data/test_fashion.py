"""The bundled world: captions, colours, photographs, tokens."""

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data.fashion import (
    COLOURS,
    GARMENTS,
    Attributes,
    Coloured,
    captions,
    colourise,
    load,
    palette,
    parse,
    random_captions,
    read_idx,
    tokenizer,
)


def idx(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def photographs(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Five photographs of noise as IDX files: images gzipped, labels plain (each pair shares its suffix)."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 3, 3, 7], dtype=np.uint8)
    for split, suffix in (("train", ".gz"), ("t10k", "")):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            (tmp_path / f"{split}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return tmp_path, images, labels


# --- captions


def test_all_560_captions_come_back_from_parse() -> None:
    every = captions()
    assert len(set(every)) == len(every) == 560
    assert [parse(text).caption for text in every] == every
    assert len({(a.garment, a.foreground, a.background) for a in map(parse, every)}) == 560
    assert all(parse(text).foreground != parse(text).background for text in every)


def test_attributes_are_indices_into_the_lists() -> None:
    attributes = parse("a red boot on a white background")
    assert attributes == Attributes(GARMENTS.index("boot"), list(COLOURS).index("red"), list(COLOURS).index("white"))
    assert parse("a pink t-shirt on a cyan background").garment == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red boot",
        "a red boot on a white background.",
        "A red boot on a white background",
        "a purple boot on a white background",
        "a red hat on a white background",
        "a red boot on a red background",
    ],
)
def test_what_is_none_of_the_560_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no caption of the fashion world"):
        parse(text)


@pytest.mark.parametrize("n", [1, 560, 700, 2000])
def test_random_captions_are_balanced(n: int) -> None:
    """Independent draws would leave every fifth caption out of 560 x 3, and the classes uneven."""
    drawn = Counter(random_captions(n, seed=3))
    assert sum(drawn.values()) == n
    assert max(drawn.values()) - min(drawn.get(text, 0) for text in captions()) <= 1


def test_random_captions_repeat_with_the_seed_and_not_without() -> None:
    assert random_captions(700, 3) == random_captions(700, 3)
    assert random_captions(700, 3) != random_captions(700, 4)
    rounds = random_captions(1120, 3)
    assert rounds[:560] != rounds[560:]
    assert rounds[:100] != captions()[:100]


# --- colours


def test_colourise_is_the_blend_of_two_colours() -> None:
    grey = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    grey[0, 0, 0], grey[1, 2, 3] = 0.0, 1.0
    fg, bg = torch.tensor([2, 7, 1]), torch.tensor([1, 0, 2])
    images = colourise(grey, fg, bg)
    values = torch.tensor(list(COLOURS.values())) / 255
    want = torch.empty(3, 3, 5, 4)
    for b in range(3):
        for c in range(3):
            want[b, c] = (1 - grey[b]) * values[bg[b], c] + grey[b] * values[fg[b], c]
    torch.testing.assert_close(images, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(images[0, :, 0, 0], palette()[1], rtol=0, atol=0)
    torch.testing.assert_close(images[1, :, 2, 3], palette()[7], rtol=0, atol=1e-6)


def test_no_three_colours_are_collinear() -> None:
    """Else two foregrounds would lie in one direction from a background, and pixels could not tell them apart."""
    colours = palette().double()
    for b in range(8):
        directions = torch.stack([colours[f] - colours[b] for f in range(8) if f != b])
        cosines = torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(directions, dim=1).T
        assert (cosines - 2 * torch.eye(7)).max() < 0.99


# --- photographs


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_photographs_are_read_and_padded_in_the_middle(photographs: tuple, split: str) -> None:
    folder, images, labels = photographs
    grey, read = load(split, folder)
    assert grey.shape == (5, 32, 32)
    assert torch.equal(grey[:, 2:-2, 2:-2], torch.from_numpy(images))
    assert grey.sum() == images.sum(dtype=np.int64)
    assert torch.equal(read, torch.from_numpy(labels.astype(np.int64)))


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images.*dataset-fashion-mnist"):
        load("train", tmp_path)
    foreign = tmp_path / "picture"
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="picture is not an IDX file"):
        read_idx(foreign)


def test_captions_say_what_the_pixels_show(photographs: tuple) -> None:
    data = Coloured("train", photographs[0])
    images, labels, texts = data.batch(200, torch.Generator().manual_seed(0))
    attributes = [parse(text) for text in texts]
    assert [a.garment for a in attributes] == labels.tolist()
    assert torch.equal(images[:, :, 0, 0], palette()[torch.tensor([a.background for a in attributes])])
    seen = {(a.foreground, a.background) for a in attributes}
    assert len(seen) > 50  # of 56
    fg, bg = (torch.tensor([getattr(a, k) for a in attributes]) for k in ("foreground", "background"))
    span = palette()[fg] - palette()[bg]
    grey = ((images - palette()[bg][..., None, None]) * span[..., None, None]).sum(1) / span.square().sum(1)[:, None, None]
    candidates = data.grey.float() / 255
    nearest = (grey[:, None] - candidates).abs().amax(dim=(2, 3)).min(1)
    assert nearest.values.max() < 1e-4
    assert torch.equal(data.labels[nearest.indices], labels)


def test_batches_repeat_with_their_generator(photographs: tuple) -> None:
    data = Coloured("t10k", photographs[0])
    first = data.batch(8, torch.Generator().manual_seed(0))
    again = data.batch(8, torch.Generator().manual_seed(0))
    other = data.batch(8, torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0])
    assert first[2] == again[2] != other[2]
    assert len(data) == 5


# --- tokens


def test_every_word_is_one_token_and_the_end_token_is_the_largest() -> None:
    """open_clip pools text at argmax of the ids: with another largest id it would read a word instead of the sentence."""
    tokens = tokenizer()
    ids = tokens([captions()[0], "a pink t-shirt on a cyan background"]).input_ids
    assert tokens.convert_ids_to_tokens(ids[0])[1:-1] == [f"{w}</w>" for w in captions()[0].replace("-", " - ").split()]
    words = {w for text in captions() for w in text.replace("-", " ").split()}
    for word in words:
        assert len(tokens(word).input_ids) == 3, word
    assert tokens.eos_token_id == len(tokens) - 1 == max(tokens.get_vocab().values())
    assert tokens.bos_token_id == len(tokens) - 2


def test_padding_is_the_end_token_and_no_caption_is_cut() -> None:
    tokens = tokenizer()
    padded = torch.tensor(tokens(captions(), padding="max_length").input_ids)
    assert padded.shape == (560, 16)
    assert (padded[:, 0] == tokens.bos_token_id).all()
    assert (padded[:, -1] == tokens.eos_token_id).all()
    assert len({tuple(row) for row in padded.tolist()}) == 560
    assert tokens.unk_token_id not in padded[:, 1:4]
    assert [tokens.decode(row, skip_special_tokens=True).replace(" - ", "-") for row in padded[:3]] == captions()[:3]
