"""The differentiable CLIP: the same cosines as the score's, a gradient for the images alone, one row a text."""

import pytest
import torch
from open_clip import create_model_and_transforms

from fastdiff.data.fashion import captions
from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore
from fastdiff.models.clip import BUNDLED_CLIP, Clip, load_clip


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [32, 48])
def test_it_is_the_cosine_of_the_clip_score(size: int) -> None:
    texts = captions()[:4]
    want = ClipScore(BUNDLED_CLIP["fashion"]).cosines(images(4, size), texts)
    assert (load_clip("fashion")(images(4, size), texts) - want).abs().max() < 1e-5


def test_each_image_is_held_against_its_own_text() -> None:
    clip, texts = load_clip("fashion"), [captions()[i] for i in (0, 77, 0)]
    together = clip(images(3), texts)
    alone = torch.cat([clip(images(3)[i : i + 1], [texts[i]]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5
    rows = clip.directions(texts)
    assert torch.equal(rows[0], rows[2])
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        clip(images(3), texts[:2])


def test_the_gradient_is_of_the_images_and_is_right() -> None:
    model, _, _ = create_model_and_transforms(f"local-dir:{BUNDLED_CLIP['fashion']}")
    clip = Clip(model.double(), load_clip("fashion").tokenizer)
    x, text = images(1).double().requires_grad_(), [captions()[3]]
    (gradient,) = torch.autograd.grad(clip(x, text).sum(), x)
    assert all(not p.requires_grad for p in model.parameters())
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-7  # smaller than the way to most kinks of its ReLUs
    with torch.no_grad():
        slope = (clip(x + h * step, text) - clip(x - h * step, text)).item() / (2 * h)
    assert slope == pytest.approx((gradient * step).sum().item(), rel=1e-3)
    assert abs(slope) > 1e-4


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"no CLIP nowhere.*Bundled: fashion.*ViT-B-32/openai"):
        load_clip("nowhere")
    with pytest.raises(UserError, match="no weights 'yesterday' for an architecture 'ViT-B-32'"):
        load_clip("ViT-B-32/yesterday")
