import pytest
import torch
from torch import Tensor, nn

from fastdiff.data.fashion import COLOURS, GARMENTS, Attributes, Coloured, captions, colourise, palette, parse
from fastdiff.eval.attributes import attribute_score, attributes, background_colour, foreground_colour, segment_distance

NAMES = list(COLOURS)


class StripeReader(nn.Module):
    """The classifier of a world in which garment k is a stripe at row 4 + 2k: where do pixels leave the border?"""

    def forward(self, images: Tensor) -> Tensor:
        away = (images - images[:, :, :1, :1]).abs().sum(dim=(1, 3))
        return away[:, 4 : 4 + 2 * len(GARMENTS) : 2]


def stripes(texts: list[str], *, brightness: float = 1.0) -> Tensor:
    asked = [parse(text) for text in texts]
    grey = torch.zeros(len(texts), 32, 32)
    for image, a in zip(grey, asked, strict=True):
        image[4 + 2 * a.garment, 4:28] = torch.linspace(0, brightness, 24)
    return colourise(grey, torch.tensor([a.foreground for a in asked]), torch.tensor([a.background for a in asked]))


@pytest.fixture(scope="module")
def photographs():
    try:
        return Coloured("t10k")
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not installed")


def test_exact_garments_score_one():
    score = attribute_score(stripes(captions()), captions(), StripeReader())
    assert (score.value, score.se) == (1.0, 0.0)


def test_a_dark_garment_keeps_its_colour():
    """No pixel comes nearer to the foreground than a third of the way, where another colour may be nearer."""
    score = attribute_score(stripes(captions(), brightness=0.35), captions(), StripeReader())
    assert score.value == 1.0


def test_indices_are_those_of_the_caption():
    text = "a cyan bag on a yellow background"
    garment, foreground, background = attributes(stripes([text]), StripeReader())
    assert Attributes(garment.item(), foreground.item(), background.item()).caption == text


@pytest.mark.parametrize(
    "wrong",
    [
        "a red coat on a blue background",
        "a green boot on a blue background",
        "a red boot on a white background",
        "a blue boot on a red background",
    ],
)
def test_one_wrong_attribute_is_a_failure(wrong):
    right = "a red boot on a blue background"
    score = attribute_score(stripes([right, wrong, right, right]), [right] * 4, StripeReader())
    assert score.value == 0.75
    assert score.se == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_captions_of_another_world_are_refused():
    with pytest.raises(ValueError, match="no caption of the fashion world"):
        attribute_score(torch.zeros(1, 3, 32, 32), ["a photo of a dog"], StripeReader())
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        attribute_score(torch.zeros(2, 3, 32, 32), [captions()[0]], StripeReader())


def test_distance_is_to_the_segment_not_to_the_line():
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    background, colours = torch.tensor([0, 1, 2, 5, 7]), palette()
    g = torch.linspace(0, 1, 1001)[:, None]
    for image, b, found in zip(images, background.tolist(), segment_distance(images, background), strict=True):
        for k in set(range(8)) - {b}:
            points = colours[b] + g * (colours[k] - colours[b])
            nearest = torch.cdist(image.flatten(1).T, points).amin(dim=1)
            assert found[k].item() == pytest.approx(nearest.square().mean().item(), abs=1e-5)
        assert found[b] == torch.inf


def test_a_background_is_never_its_own_foreground():
    flat = palette()[:, :, None, None].expand(-1, -1, 32, 32)
    assert background_colour(flat).tolist() == list(range(8))
    assert (foreground_colour(flat, torch.arange(8)) != torch.arange(8)).all()


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_colours_of_a_thousand_photographs_are_exact(photographs, noise):
    generator = torch.Generator().manual_seed(0)
    images, _, texts = photographs.pick(torch.arange(1000), generator)
    images = images + noise * torch.randn(images.shape, generator=generator)
    asked = [parse(text) for text in texts]
    background = background_colour(images)
    assert background.tolist() == [a.background for a in asked]
    assert foreground_colour(images, background).tolist() == [a.foreground for a in asked]


def test_the_nearest_colour_of_the_farthest_pixels_would_not_do(photographs):
    """Why the rule is a line: the mean of the 5 % farthest pixels names another colour on some photographs."""
    images, _, texts = photographs.pick(torch.arange(1000), torch.Generator().manual_seed(0))
    start = palette()[background_colour(images)]
    pixels = images.flatten(2).transpose(1, 2)
    farthest = (pixels - start[:, None]).norm(dim=2).topk(51).indices
    mean = pixels.gather(1, farthest[..., None].expand(-1, -1, 3)).mean(dim=1)
    found = torch.cdist(mean, palette()).argmin(dim=1)
    right = (found == torch.tensor([parse(text).foreground for text in texts])).float().mean()
    assert 0.9 < right < 0.99
