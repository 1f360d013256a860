import importlib.util
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from fastdiff.data.fashion import random_captions
from fastdiff.eval.clip import ClipScore, reduce


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


def test_conventions_name_all_five_choices(clip_folder):
    conventions = ClipScore(clip_folder, prefix="a photo of ", scale=2.5, clamp="none").conventions
    assert conventions["model"] == clip_folder.name
    assert (conventions["prefix"], conventions["scale"], conventions["clamp"]) == ("a photo of ", 2.5, "none")
    assert "32x32" in str(conventions["image"])


def test_wrong_arguments_are_refused(clip_folder, images, tmp_path):
    with pytest.raises(ValueError, match=r"no open_clip_config\.json"):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match="'per_sample', 'mean' or 'none'"):
        ClipScore(clip_folder, clamp="sometimes")  # type: ignore[arg-type]
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
