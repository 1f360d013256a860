import hashlib

import torch

from fastdiff.eval.noise import generators, image_generator


def test_the_seed_is_the_documented_hash():
    digest = hashlib.sha256(b"fastdiff.eval 3 41").digest()
    assert image_generator(3, 41).initial_seed() == int.from_bytes(digest[:7], "big")


def test_an_image_keeps_its_noise_in_every_list():
    alone = torch.randn(4, generator=image_generator(5, 9))
    for indices in (range(12), [9], [11, 9, 2], torch.tensor([9, 10])):
        drawn = {int(i): torch.randn(4, generator=g) for i, g in zip(indices, generators(5, indices), strict=True)}
        assert drawn[9].equal(alone)


def test_seeds_and_images_differ_and_counting_up_never_meets_them():
    draws = [torch.randn(4, generator=image_generator(seed, i)) for seed in range(3) for i in range(3)]
    plain = [torch.randn(4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    assert len({tuple(d.tolist()) for d in (*draws, *plain)}) == 12
