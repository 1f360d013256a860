import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.eval import images as module
from fastdiff.eval.bank import FeatureBank
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import load_extractor
from fastdiff.eval.images import ImageFolder, features_of_folder, prepared
from fastdiff.eval.looks import CHECKSUM, looks
from fastdiff.eval.preprocess import Preprocess


def write(path, height=12, width=10, *, mode="RGB", seed=0) -> np.ndarray:
    shape: tuple[int, ...] = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


class Pooled(torch.nn.Module):
    """Levels [B, 3, 9, 8] to a product with a fixed matrix: every pixel counts, and none like another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3 * 9 * 8, 5, generator=torch.Generator().manual_seed(0)) / 255)

    def forward(self, levels):
        return levels.flatten(1) @ self.weight


def extractor(preprocess="clean", size=(9, 8), name="pooled") -> FeatureExtractor:
    return FeatureExtractor(name=name, network=Pooled(), preprocess=Preprocess.parse(preprocess), dim=5, size=size)


def test_order_is_natural_and_classes_are_the_subfolders(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a10/1.png", "a2/deep/1.webp", "a2/.hidden.png", "a2/notes.txt", "a2/01.bmp"):
        write(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
    folder = ImageFolder(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in folder.files] == [
        "a2/01.bmp", "a2/deep/1.webp", "a10/1.png", "b/2.png", "b/10.JPG",
    ]  # fmt: skip
    assert folder.classes == ["a2", "a10", "b"]
    assert folder.labels is not None
    assert folder.labels.tolist() == [0, 0, 1, 2, 2]
    write(tmp_path / "3.png")
    mixed = ImageFolder(tmp_path)
    assert (mixed.classes, mixed.labels, len(mixed)) == ([], None, 6)
    assert [file.name for file in ImageFolder(tmp_path, recursive=False).files] == ["3.png"]


def test_pixels_are_those_of_the_files(tmp_path):
    colour, grey = write(tmp_path / "0.png", seed=1), write(tmp_path / "1.png", mode="L", seed=2)
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "2.png")
    found = ImageFolder(tmp_path)(torch.tensor([1, 0, 2]))
    assert torch.equal(found[0], torch.from_numpy(grey).expand(3, -1, -1) / 255)
    assert torch.equal(found[1], torch.from_numpy(colour).permute(2, 0, 1) / 255)
    palette = np.asarray(Image.open(tmp_path / "2.png").convert("RGB"))
    assert torch.equal(found[2], torch.from_numpy(palette.copy()).permute(2, 0, 1) / 255)


def test_alpha_is_refused_by_the_name_of_its_file(tmp_path):
    write(tmp_path / "0.png", mode="RGBA")
    palette = Image.fromarray(write(tmp_path / "see.bmp")).convert("P")
    palette.save(tmp_path / "1.png", transparency=0)
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "2.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "see.bmp").read_bytes()[:40])
    folder = ImageFolder(tmp_path)
    for i, why in enumerate(
        ("0.png has an alpha", "1.png has an alpha", r"2.png .I;16. has more than 8 bits", "3.png cannot be decoded")
    ):
        with pytest.raises(UserError, match=why):
            folder(torch.tensor([i]))


def test_a_truncated_file_is_no_picture(tmp_path):
    write(tmp_path / "0.png", 64, 64)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"0\.png cannot be decoded"):
        ImageFolder(tmp_path)(torch.tensor([0]))


def test_sizes_that_differ_name_two_files_unless_they_are_resized(tmp_path):
    write(tmp_path / "0.png", 12, 10)
    write(tmp_path / "1.png", 12, 11)
    with pytest.raises(UserError, match=r"0\.png and .*1\.png are 12x10 and 12x11"):
        ImageFolder(tmp_path)(torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"0\.png and .*1\.png are 12x10 and 12x11"):
        features_of_folder(tmp_path, extractor("none", size=None), workers=0)
    assert features_of_folder(tmp_path, extractor(), workers=0).shape == (2, 5)


@pytest.mark.parametrize("preprocess", ["clean", "tf1:truncate", "lanczos6-centre", "pil-bicubic", "torch-bicubic:none"])
def test_features_are_those_of_the_images_in_memory(tmp_path, preprocess):
    for i in range(5):
        write(tmp_path / f"{i}.png", 12, 10, seed=i)
    expected = extractor(preprocess).features(ImageFolder(tmp_path)(torch.arange(5)))
    found = features_of_folder(tmp_path, extractor(preprocess), workers=0, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_though_they_share_few_buffers(tmp_path, workers):
    """23 batches through at most five buffers: one that were overwritten too early would show."""
    for i in range(46):
        write(tmp_path / f"{i}.png", 12 + i % 3, 10, seed=i)
    seen: list[int] = []
    before = torch.get_rng_state()
    found = features_of_folder(tmp_path, extractor(), workers=workers, batch_size=2, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's noise does not depend on who decoded
    assert torch.equal(found, features_of_folder(tmp_path, extractor(), workers=0, batch_size=2))
    assert seen == [2] * 23


def test_an_error_in_a_worker_is_the_users(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png")
    write(tmp_path / "5.png", mode="RGBA")
    with pytest.raises(UserError) as caught:
        features_of_folder(tmp_path, extractor(), workers=1, batch_size=2)
    assert str(caught.value) == f"{tmp_path}/5.png has an alpha channel: composite it on a background first."
    with pytest.raises(UserError, match=r"0\.png: a crop of 99x99 does not fit"):
        features_of_folder(tmp_path, extractor("centre99", size=(99, 99)), workers=0)


def test_batches_come_in_order_and_only_those_asked_for(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 9), (i, i, i)).save(tmp_path / f"{i}.png")
    batches = prepared(ImageFolder(tmp_path), extractor(), torch.tensor([3, 1, 2]), workers=1, batch_size=2)
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[3, 1], [2]]


def test_a_bank_goes_on_where_it_stopped_and_knows_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 4)
    for i in range(9):
        write(tmp_path / "images" / f"{'ab'[i > 4]}" / f"{i}.png", seed=i)
    folder, bank = ImageFolder(tmp_path / "images"), tmp_path / "bank"
    expected, seen = features_of_folder(folder, extractor(), workers=0), []

    def stops(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features_of_folder(folder, extractor(), workers=0, batch_size=2, bank=bank, progress=stops)
    seen.clear()
    found = features_of_folder(folder, extractor(), workers=0, batch_size=2, bank=bank, progress=seen.append)
    assert sum(seen) == 5  # four were kept
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    opened = FeatureBank.open(bank)
    assert opened.columns["class"].tolist() == [0] * 5 + [1] * 4
    assert features_of_folder(folder, extractor(), bank=bank, progress=seen.append).equal(found)
    assert sum(seen) == 5
    with pytest.raises(UserError, match="other images or of another extractor"):
        features_of_folder(folder, extractor(name="other"), bank=bank)
    write(tmp_path / "images" / "b" / "9.png")
    with pytest.raises(UserError, match="other images or of another extractor"):
        features_of_folder(tmp_path / "images", extractor(), bank=bank)


def test_an_empty_folder_is_said_so(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="no folder of images"):
        ImageFolder(tmp_path / "none")


def test_what_is_looked_at_are_the_files_and_in_their_order(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(draw.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    folder, seen = ImageFolder(tmp_path), []
    features_of_folder(folder, load_extractor("random-conv"), workers=0, batch_size=2, looked=seen.append)
    assert [len(part) for part in seen] == [2, 2, 1]
    own = looks(folder(torch.arange(5)))
    torch.testing.assert_close(torch.cat(seen), own, rtol=0, atol=1e-6)
    assert len(own[:, CHECKSUM].unique()) == 5
