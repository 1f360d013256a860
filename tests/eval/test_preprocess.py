import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.eval.preprocess import Preprocess, clean, quantise, tf1


def levels(h: int, w: int, *, n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 3, h, w), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("size", [(48, 80), (299, 299), (400, 350), (299, 700), (3, 5), (1023, 64)])
def test_clean_is_pil_on_each_channel_in_float(size):
    x = levels(*size)
    found = Preprocess("clean")(x / 255, (299, 299))
    for image, ours in zip(x, found, strict=True):
        for plane, channel in zip(image, ours, strict=True):
            expected = np.asarray(Image.fromarray(plane.numpy(), mode="F").resize((299, 299), Image.Resampling.BICUBIC))
            assert abs(expected.clip(0, 255) - channel.numpy()).max() < 2e-4
    if size != (299, 299):
        assert (found != found.round()).float().mean() > 0.5  # rounding again would move FID


def test_clean_clips_the_overshoot_of_the_filter():
    x = torch.zeros(1, 3, 16, 16)
    x[..., 8:] = 1
    raw = np.asarray(Image.fromarray(255 * x[0, 0].numpy()).resize((40, 40), Image.Resampling.BICUBIC))
    assert raw.max() > 260
    found = Preprocess("clean")(x, (40, 40))
    assert (found.min(), found.max()) == (0, 255)


def test_tf1_is_the_grid_of_tensorflow_1_written_out():
    """Four rows to seven: row i reads at i * 4 / 7, the last row repeats beyond the border."""
    x = levels(4, 4, n=1)
    found = tf1(x, (7, 7))[0, 0]
    for i in range(7):
        for j in range(7):
            (y, dy), (z, dz) = divmod(i * 4 / 7, 1), divmod(j * 4 / 7, 1)
            rows, columns = [int(y), min(int(y) + 1, 3)], [int(z), min(int(z) + 1, 3)]
            a, b, c, d = (x[0, 0, r, k].item() for r in rows for k in columns)
            top, bottom = a + (b - a) * dz, c + (d - c) * dz
            assert found[i, j].item() == pytest.approx(top + (bottom - top) * dy, abs=1e-3)
    assert torch.equal(tf1(x, (4, 4)), x)
    shifted = F.interpolate(x, (7, 7), mode="bilinear", align_corners=False)[0, 0]
    assert (found - shifted).abs().max() > 10  # half-pixel centres are another grid


def test_tf1_golden_ramp():
    ramp = torch.arange(4.0).expand(1, 3, 4, 4) * 10
    expected = torch.tensor([0, 40 / 7, 80 / 7, 120 / 7, 160 / 7, 200 / 7, 30])  # the last position, 24/7, lies past the centre 3
    torch.testing.assert_close(tf1(ramp, (7, 7))[0, 0, 0], expected, rtol=1e-6, atol=1e-5)


def test_pytorch_fid_is_torch_without_antialias():
    x = levels(64, 48)
    expected = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Preprocess("pytorch-fid")(x / 255, (299, 299)) / 255, expected, rtol=0, atol=1e-6)
    small = Preprocess("pytorch-fid")(x / 255, (16, 16))
    assert (small - F.interpolate(x, (16, 16), mode="bilinear", antialias=True)).abs().max() > 10


def test_lanczos_centre_crops_then_rounds_then_cleans():
    x = levels(90, 60, n=1)
    picture = Image.fromarray(x[0].byte().permute(1, 2, 0).numpy())
    square = picture.crop((0, 15, 60, 75)).resize((32, 32), Image.Resampling.LANCZOS)
    eight_bit = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
    assert torch.equal(Preprocess("lanczos32-centre")(x / 255, (299, 299)), clean(eight_bit, (299, 299)))


def test_dgm_eval_resizes_8_bit_rgb():
    x = levels(40, 50, n=1)
    expected = np.array(Image.fromarray(x[0].byte().permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(Preprocess("pil-bicubic")(x / 255, (24, 24))[0].permute(1, 2, 0).numpy(), expected)


def test_torch_bicubic_is_near_pil_but_another_preprocess():
    """Measured: 0.004 of 255 levels; near enough to look equal, so the name has to tell them apart."""
    x = levels(256, 256)
    difference = (Preprocess("torch-bicubic")(x / 255, (299, 299)) - Preprocess("clean")(x / 255, (299, 299))).abs().max()
    assert 0 < difference < 0.02
    assert Preprocess("torch-bicubic").id != Preprocess("clean").id


@pytest.mark.parametrize("name", ["clean", "tf1", "pytorch-fid", "lanczos32-centre", "pil-bicubic", "torch-bicubic"])
def test_a_constant_image_stays_itself(name):
    found = Preprocess(name)(torch.full((1, 3, 40, 52), 51 / 255), (33, 47))
    torch.testing.assert_close(found, torch.full((1, 3, 33, 47), 51.0), rtol=0, atol=1e-4)


def test_truncation_darkens_by_half_a_level_and_rounding_does_not():
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert (quantise(x) - 255 * x).mean().abs() < 0.01
    assert (quantise(x, "truncate") - 255 * x).mean().item() == pytest.approx(-0.5, abs=0.01)
    stored = torch.arange(256).float()[None, None].expand(1, 3, 1, 256)
    assert torch.equal(quantise(stored / 255, "truncate"), stored)  # what is 8 bits already does not move


def test_the_id_names_the_rounding():
    assert [Preprocess("clean").id, Preprocess("tf1", "truncate").id] == ["clean", "tf1:truncate"]
    for text in ("clean", "lanczos512-centre:truncate", "none:none"):
        assert Preprocess.parse(text).id == text


def test_grey_becomes_rgb_and_alpha_is_refused():
    grey = torch.rand(1, 1, 8, 8)
    assert torch.equal(Preprocess("tf1")(grey, (9, 9)), Preprocess("tf1")(grey.expand(1, 3, 8, 8), (9, 9)))
    with pytest.raises(ValueError, match="Composite the alpha channel"):
        Preprocess()(torch.rand(1, 4, 8, 8), (9, 9))


@pytest.mark.parametrize(
    "bad", [torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), torch.nan), torch.full((1, 3, 4, 4), 255.0)]
)
def test_a_wrong_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        Preprocess()(bad, (8, 8))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UserError, match="no preprocess 'bicubic'"):
        Preprocess("bicubic")
    with pytest.raises(UserError, match="cut off silently"):
        Preprocess("pil-bicubic", "none")
    with pytest.raises(UserError, match="name a resize"):
        Preprocess("none")(torch.rand(1, 3, 8, 8), (9, 9))
    with pytest.raises(ValueError, match="does not fit"):
        Preprocess("centre299")(torch.rand(1, 3, 64, 64), (299, 299))
    with pytest.raises(ValueError, match="divide 8-bit levels"):
        Preprocess()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (9, 9))
