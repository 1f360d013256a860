"""The digits world: an exact class-conditional teacher in pixel space."""

import pytest
import torch
from diffusers import DDPMScheduler

from fastdiff.diffusion import ddim_sample, process_from_scheduler, trailing_times

pytest.importorskip("sklearn")


def test_exact_teacher_draws_the_class_it_is_asked_for() -> None:
    from fastdiff.data import digits

    images, labels = digits.load()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    process, _ = process_from_scheduler(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config)
    teacher = digits.teacher(process)
    asked = torch.arange(10).repeat(6)
    noise = torch.randn(60, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = ddim_sample(lambda x, t: teacher(x, t, asked), noise, trailing_times(1000, 20))
    distance, nearest = torch.cdist(x0.flatten(1), images.flatten(1)).min(dim=1)
    assert torch.equal(labels[nearest], asked)
    assert distance.max() < 6 * 0.1 * 8  # within the blur of an image, not between two of them
    free = ddim_sample(lambda x, t: teacher(x, t), noise, trailing_times(1000, 20))
    assert labels[torch.cdist(free.flatten(1), images.flatten(1)).argmin(dim=1)].unique().numel() >= 8
