"""Rewards: the log-probability of a caption, for real pictures and by hand, and what is none."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.data.fashion import ASSETS, GARMENTS, TEMPLATE, captions
from fastdiff.models.clip import load_clip
from fastdiff.models.rewards import CaptionReward, Reward, load_reward


def photographs(n: int) -> tuple[Tensor, list[str]]:
    """Real pictures, white on black, and their captions."""
    stored = load_file(ASSETS / "fashion-real.safetensors")
    grey = torch.nn.functional.pad(stored["grey"][:n] / 255, (2, 2, 2, 2))
    images = (20 + grey * 220)[:, None].expand(-1, 3, -1, -1) / 255
    names = [GARMENTS[i] for i in stored["garment"][:n].tolist()]
    return images, [TEMPLATE.format(foreground="white", garment=name, background="black") for name in names]


def test_it_is_the_log_softmax_over_all_captions_of_the_scaled_cosines() -> None:
    clip, (images, texts) = load_clip("fashion"), photographs(3)
    every = [*captions()[:20], *texts]
    reward = CaptionReward(clip, every)
    distinct = list(dict.fromkeys(every))
    cosines = torch.stack([clip(images, [text] * 3) for text in distinct], dim=1)
    want = (clip.scale * cosines).log_softmax(1)[torch.arange(3), [distinct.index(text) for text in texts]]
    assert (reward(images, texts) - want).abs().max() < 1e-4
    assert clip.scale == pytest.approx(clip.model.logit_scale.exp().item())


def test_real_pictures_are_worth_more_for_their_own_captions() -> None:
    images, texts = photographs(100)
    reward = load_reward("fashion", captions())
    others = [text.replace("white", "red") for text in texts]
    assert (reward(images, texts) > reward(images, others)).double().mean() > 0.95
    assert reward(images, texts).median() > -1


def test_the_gradient_is_of_the_images_alone_and_leads_up() -> None:
    images, texts = photographs(4)
    reward, x = load_reward("fashion", captions()), (images + 0.1).requires_grad_()
    before = reward(x, texts)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    with torch.no_grad():
        after = reward(x + 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None], texts)
    assert (after > before).all()


def test_what_is_no_reward_and_a_text_that_is_none_of_the_captions_are_refused() -> None:
    with pytest.raises(TypeError, match="no reward"):
        load_reward(len, captions())
    reward = load_reward("fashion", captions())
    assert isinstance(reward, Reward)
    assert load_reward(reward, []) is reward
    assert repr(reward) == "CaptionReward(Clip(fashion), 560 captions, threshold=-0.105)"
    with pytest.raises(KeyError):
        reward(photographs(1)[0], ["a dog"])
