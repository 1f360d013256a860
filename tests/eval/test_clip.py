import importlib.util
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdiff.data.fashion import random_captions
from fastdiff.eval.clip import ClipScore, reduce
from fastdiff.eval.stats import Score


@pytest.fixture
def images() -> torch.Tensor:
    levels = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


@pytest.mark.parametrize(
    ("clamp", "mild", "bad"),
    [("per_sample", 10.0, 10.0), ("mean", 5.0, 0.0), ("none", 5.0, -20.0)],
)
def test_clamp_modes_differ_on_images_that_fail(clamp, mild, bad):
    assert reduce(torch.tensor([0.2, -0.1]), scale=100, clamp=clamp).value == pytest.approx(mild)
    assert reduce(torch.tensor([0.2, -0.6]), scale=100, clamp=clamp).value == pytest.approx(bad)


def test_identical_is_the_scale_and_opposite_is_zero():
    assert reduce(torch.ones(3), scale=100, clamp="per_sample").value == 100
    assert reduce(-torch.ones(3), scale=100, clamp="per_sample").value == 0
    assert reduce(torch.ones(3), scale=2.5, clamp="none").value == 2.5


def test_standard_error_scales_with_the_score():
    cosines = torch.tensor([0.1, 0.2, 0.3, 0.4])
    score = reduce(cosines, scale=100, clamp="none")
    assert score.value == pytest.approx(25)
    assert score.se == pytest.approx(100 * cosines.double().std().item() / 2, rel=1e-6)


def test_equals_open_clip_by_hand_and_its_own_preprocessing(clip_folder, images):
    texts = random_captions(3, 0) * 2
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(texts)
    pictures = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]
    prepared = torch.stack([preprocess(picture) for picture in pictures])
    score = ClipScore(clip_folder)
    torch.testing.assert_close(score.prepare(images), prepared, rtol=0, atol=1e-5)
    with torch.inference_mode():
        image, text = model.eval().encode_image(prepared), model.encode_text(tokens)
    expected = torch.cosine_similarity(image, text)
    torch.testing.assert_close(score.cosines(images, texts), expected, rtol=1e-4, atol=1e-5)
    assert score(images, texts).value == pytest.approx(100 * expected.clamp(min=0).mean().item(), rel=1e-4)


def test_batches_do_not_matter(clip_folder, images):
    score, texts = ClipScore(clip_folder), random_captions(6, 1)
    torch.testing.assert_close(score.cosines(images, texts, batch_size=1), score.cosines(images, texts), rtol=1e-5, atol=1e-6)


def test_each_image_meets_its_own_caption(clip_folder, images):
    score, texts = ClipScore(clip_folder), random_captions(6, 2)
    forward, backward = score.cosines(images, texts), score.cosines(images.flip(0), texts[::-1])
    torch.testing.assert_close(forward, backward.flip(0), rtol=1e-5, atol=1e-6)
    assert (score.cosines(images, [texts[0]] * 6)[1:] - forward[1:]).abs().max() > 1e-3


def test_the_prefix_is_put_before_the_caption(clip_folder, images):
    texts = random_captions(6, 3)
    prefixed = ClipScore(clip_folder, prefix="white ").cosines(images, texts)
    by_hand = ClipScore(clip_folder).cosines(images, ["white " + text for text in texts])
    torch.testing.assert_close(prefixed, by_hand, rtol=0, atol=0)
    assert (prefixed - ClipScore(clip_folder).cosines(images, texts)).abs().max() > 1e-3


def test_images_of_another_size_are_squashed_smoothly(clip_folder):
    score = ClipScore(clip_folder)
    flat = torch.full((1, 3, 48, 80), 0.3)
    torch.testing.assert_close(score.prepare(flat), torch.full((1, 3, 32, 32), (0.3 - 0.5) / 0.25), rtol=0, atol=1e-5)
    # the finest pattern: without a filter every third pixel of it is picked, and it survives
    checks = (torch.arange(96)[:, None] + torch.arange(96)) % 2.0
    assert score.prepare(checks.expand(1, 3, 96, 96))[..., 4:-4, 4:-4].abs().max() < 0.1


@pytest.mark.parametrize(("height", "width"), [(48, 80), (91, 40), (32, 47), (20, 33)])
def test_crop_is_the_preprocessing_of_clip(clip_folder, height, width):
    """torchvision's shorter side and centre crop, on 8-bit PIL images, to the rounding of one level."""
    coarse = torch.rand(2, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (height, width), mode="bilinear")
    images = (images * 255).round() / 255
    theirs = open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.25,) * 3, resize_mode="shortest")
    pictures = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]
    expected = torch.stack([theirs(picture) for picture in pictures])
    found = ClipScore(clip_folder, prepare="crop").prepare(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.6 / 255 / 0.25)
    assert (ClipScore(clip_folder).prepare(images) - expected).abs().max() > 0.1


def test_a_function_goes_before_the_crop_and_is_named(clip_folder, images):
    def centre(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 4:-4, 4:-4]

    score = ClipScore(clip_folder, prepare=centre)
    torch.testing.assert_close(score.prepare(images), ClipScore(clip_folder).prepare(images[:, :, 4:-4, 4:-4]))
    assert "centre, then crop" in str(score.conventions["image"])


def test_conventions_name_all_five_choices(clip_folder, images):
    score = ClipScore(clip_folder, prefix="a photo of ", scale=2.5, clamp="none")
    conventions = score(images, random_captions(6, 4)).conventions
    assert conventions == score.conventions
    assert set(conventions) == {"model", "prefix", "scale", "clamp", "image"}
    assert conventions["model"] == clip_folder.name
    assert (conventions["prefix"], conventions["scale"], conventions["clamp"]) == ("a photo of ", 2.5, "none")
    assert "squash to 32x32" in str(conventions["image"])
    assert "crop to 32x32" in str(ClipScore(clip_folder, prepare="crop").conventions["image"])


def test_the_error_covers_the_expected_score():
    """200 draws of 100 cosines, some below the clamp: the expectation is that of the clamped cosine."""
    generator = torch.Generator().manual_seed(0)
    draws = 0.1 + 0.15 * torch.randn(200, 100, generator=generator)
    many = (0.1 + 0.15 * torch.randn(10**6, generator=generator)).clamp(min=0)
    expected = Score.of(100 * many).value
    found = [reduce(cosines, scale=100, clamp="per_sample") for cosines in draws]
    covered = sum(abs(f.value - expected) < 1.96 * f.se for f in found) / 200
    assert 0.90 <= covered <= 0.98


def test_wrong_arguments_are_refused(clip_folder, images, tmp_path):
    with pytest.raises(ValueError, match=r"no open_clip_config\.json"):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match="'per_sample', 'mean' or 'none'"):
        ClipScore(clip_folder, clamp="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'squash', 'crop' or a function"):
        ClipScore(clip_folder, prepare="stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="6 images and 1 captions"):
        ClipScore(clip_folder).cosines(images, random_captions(1, 0))
    with pytest.raises(ValueError, match="without tokenizer"):
        ClipScore(ClipScore(clip_folder).model)


def test_equal_captions_in_a_training_batch_are_not_punished():
    path = Path(__file__).parents[2] / "trainers" / "fashion_clip.py"
    spec = importlib.util.spec_from_file_location("fashion_clip", path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    text = torch.eye(3)
    index = torch.tensor([0, 1, 1, 2, 1])  # one caption occurs three times
    images, scale = text[index], torch.tensor(30.0)
    own = program.loss_of_distinct_captions(images, text, index, scale).item()
    assert own == pytest.approx((0 + (2 * 0 + torch.tensor(3.0).log().item()) / 3) / 2, abs=1e-4)  # only the entropy of a tie
    images.requires_grad_()
    program.loss_of_distinct_captions(images, text, index, scale).backward()
    assert images.grad is not None
    assert images.grad.abs().max() < 1e-4  # nothing pushes an image from its own caption
