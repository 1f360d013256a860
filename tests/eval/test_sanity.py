import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from torch import Tensor

from fastdiff.eval.duplicates import duplicates, perceptual_hash, twins
from fastdiff.eval.sanity import enforce, feature_gates, file_gates, image_gates


def scenes(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth random pictures: eight random frequencies a channel."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def gates(images: Tensor, **options) -> dict[str, int]:
    return {f.gate: f.count for f in image_gates(images, **options)}


def test_hash_is_the_published_one():
    images = scenes(5).double()
    luma = np.einsum("nchw,c->nhw", images.numpy(), [0.299, 0.587, 0.114])
    low = dctn(luma, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(5, 64)
    assert (perceptual_hash(images).numpy() == (low > np.median(low, axis=1, keepdims=True))).all()


def test_hash_survives_scale_noise_and_eight_bits():
    images = scenes(60)
    known = perceptual_hash(images)
    larger = torch.nn.functional.interpolate(images, (96, 96), mode="bicubic", align_corners=False).clamp(0, 1)
    noisy = (images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for changed, bits in ((larger, 1), ((images * 255).round() / 255, 1), (noisy, 4)):
        assert (perceptual_hash(changed) != known).sum(dim=1).double().mean() <= bits
    assert (known != known.roll(1, 0)).sum(dim=1).double().mean() > 24  # different images differ by half of the bits


@pytest.mark.parametrize("block", [3, 2048])
def test_a_twin_points_to_the_first_that_looks_the_same(block):
    a, b, c = scenes(3)
    images = torch.stack([a, b, a + 0.002, c, b, a]).clamp(0, 1)
    assert twins(images, block=block).tolist() == [-1, -1, 0, -1, 1, 0]
    assert duplicates(images) == 3


def test_the_same_shape_in_another_colour_is_no_twin():
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 8:20, 5:25], images[1, 2, 8:20, 5:25] = 1, 1
    assert (perceptual_hash(images)[0] != perceptual_hash(images)[1]).sum() <= 2  # luma alone would say so
    assert duplicates(images) == 0


def test_flat_images_of_one_colour_are_twins_and_have_no_bits_of_round_off():
    flat = torch.tensor([0.3, 0.3, 0.7])[:, None, None, None].expand(3, 3, 40, 40)
    assert twins(flat).tolist() == [-1, 0, -1]
    assert (perceptual_hash(flat).sum(dim=1) == 1).all()  # the mean


def test_good_images_pass_every_gate():
    assert image_gates(scenes(50), size=(32, 32)) == []


def test_each_defect_is_found_by_its_own_gate_and_counted():
    images = scenes(200)
    images[3, 1, 2, 2] = torch.nan
    images[7] = 0.25
    images[11] = 2 * images[11] - 1
    images[20:24] = images[19]
    assert gates(images, size=(64, 64)) == {"nan": 1, "size": 200, "range": 1, "constant": 1, "duplicates": 4}
    assert gates(images[:1]) == {"n": 1}
    assert gates(images[19:24]) == {"identical": 5}


def test_a_range_of_bytes_or_of_minus_one_is_named():
    (found,) = image_gates(2 * scenes(5) - 1)
    assert found.gate == "range"
    assert "(x + 1) / 2" in found.message


def test_one_percent_of_duplicates_passes_and_more_does_not():
    images = scenes(200)
    images[1], images[2] = images[0], images[0]
    assert gates(images) == {}
    images[3] = images[0]
    assert gates(images) == {"duplicates": 3}


def test_feature_gates_count_rows():
    def found(x: Tensor) -> dict[str, int]:
        return {f.gate: f.count for f in feature_gates(x)}

    x = torch.zeros(10_000, 4)
    assert found(x) == {}
    x[5, 0] = torch.inf
    assert found(x) == {"nan": 1}
    assert found(x[10:15]) == {"bias": 5}
    assert found(x[10:13]) == {"rank": 3, "bias": 3}
    assert found(x[:1]) == {"n": 1}


def test_less_than_two_images_are_refused_and_the_rest_is_told():
    with pytest.raises(ValueError, match="1 images: a spread needs two"):
        enforce(feature_gates(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="0 images"):
        enforce(image_gates(torch.zeros(0, 3, 4, 4)))
    assert len(enforce(feature_gates(torch.zeros(3, 4)))) == 2


def test_a_jpeg_is_known_by_its_bytes_not_by_its_name(tmp_path):
    picture = Image.fromarray((scenes(1)[0] * 255).byte().permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png", format="JPEG")
    picture.save(tmp_path / "b.png")
    (found,) = file_gates(sorted(tmp_path.iterdir()))
    assert (found.gate, found.count) == ("jpeg", 1)
    assert file_gates([tmp_path / "b.png"]) == []
