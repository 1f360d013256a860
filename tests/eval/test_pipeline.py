import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerAncestralDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

from fastdiff.data.fashion import random_captions
from fastdiff.errors import UserError
from fastdiff.eval.identity import pipeline_identity
from fastdiff.eval.noise import generators, image_generator
from fastdiff.eval.pipeline import initial_latents, pipeline_subject

PROMPTS = random_captions(7, 0)


def unconditional_unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    ).eval()


def tiny_dit() -> DiTPipeline:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8, norm_num_groups=4
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, sample_size=8)
    return DiTPipeline(transformer=network.eval(), vae=vae, scheduler=DDIMScheduler())


@pytest.fixture
def ancestral(teacher):
    """The teacher with a scheduler that draws noise at every step."""
    before, teacher.scheduler = teacher.scheduler, EulerAncestralDiscreteScheduler.from_config(teacher.scheduler.config)
    yield teacher
    teacher.scheduler = before


def in_batches(subject, prompts: list[str], size: int) -> Tensor:
    ids = list(range(len(prompts)))
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    return torch.cat([subject.draw([prompts[i] for i in part], seed=4, indices=part) for part in parts])


def test_latents_of_an_image_are_bitwise_equal_in_batches_of_1_7_and_64(teacher):
    whole = initial_latents(teacher, generators(4, range(64)))
    assert whole.shape == (64, 4, 8, 8)
    for size in (1, 7):
        parts = [initial_latents(teacher, generators(4, ids.tolist())) for ids in torch.arange(64).split(size)]
        assert torch.cat(parts).equal(whole)
    assert whole[10].equal(torch.randn(4, 8, 8, generator=image_generator(4, 10)))
    assert abs(whole.mean().item()) < 5 / 16384**0.5
    assert abs(whole.var().item() - 1) < 5 * (2 / 16384) ** 0.5


@pytest.mark.parametrize("kind", ["deterministic", "ancestral"])
def test_images_agree_in_batches_of_1_7_and_64(kind, teacher, request):
    pipeline = teacher if kind == "deterministic" else request.getfixturevalue("ancestral")
    prompts = random_captions(64, 1)
    subject = pipeline_subject("teacher", pipeline, steps=3, guidance_scale=2.0)
    whole = in_batches(subject, prompts, 64)
    assert whole.flatten(1).unique(dim=0).shape[0] == 64
    for size in (1, 7):
        torch.testing.assert_close(in_batches(subject, prompts, size), whole, rtol=0, atol=1e-5)


def test_a_stochastic_scheduler_draws_from_the_images_own_generator(ancestral):
    subject = pipeline_subject("teacher", ancestral, steps=3, guidance_scale=1.0)
    one = subject.generate(PROMPTS[:2], generators(0, [0, 1]))
    draws = generators(0, [0, 1])
    torch.randn(4, 8, 8, generator=draws[1])
    swapped = subject.generate(PROMPTS[:2], [image_generator(0, 0), draws[1]])
    assert one[0].equal(swapped[0])
    assert not one[1].equal(swapped[1])


def test_pipelines_start_from_the_same_noise(teacher, student):
    seen: list[Tensor] = []
    for pipeline, options in ((teacher, {"steps": 2, "guidance_scale": 3.0}), (teacher, {"steps": 1}), (student, {})):
        subject = pipeline_subject("x", pipeline, **options)
        first: list[Tensor] = []
        hook = pipeline.unet.register_forward_pre_hook(lambda module, args, kept=first: kept.append(args[0]))
        subject.draw(PROMPTS, seed=0, indices=range(7))
        hook.remove()
        seen.append(first[0][: len(PROMPTS)])
    assert seen[0].equal(initial_latents(teacher, generators(0, range(7))))
    assert all(x.equal(seen[0]) for x in seen)


def test_images_are_those_of_the_pipelines_own_call(teacher):
    images = pipeline_subject("teacher", teacher, steps=2, guidance_scale=3.0).draw(PROMPTS, seed=0, indices=range(7))
    own = teacher(
        PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=generators(0, range(7)), output_type="np"
    ).images  # in float32 diffusers draws the same latents from the same generators
    torch.testing.assert_close(images.permute(0, 2, 3, 1), torch.from_numpy(own), rtol=0, atol=1e-6)


def test_names_steps_guidance_size_and_parameters_are_measured(teacher, student):
    bare = pipeline_subject("student", student)
    assert (bare.name, bare.steps, bare.guidance_scale, bare.resolution) == ("student (1 step)", 1, 1.0, (32, 32))
    given = pipeline_subject("teacher", teacher, steps=3, guidance_scale=2.5)
    assert (given.name, given.steps, given.guidance_scale) == ("teacher (3 steps)", 3, 2.5)
    counts = [sum(p.numel() for p in part.parameters()) for part in (teacher.unet, teacher.vae, teacher.text_encoder)]
    assert given.sizes() == {
        "parameters_m": pytest.approx(counts[0] / 1e6),
        "pipeline_parameters_m": pytest.approx(sum(counts) / 1e6),
        "size_mb": None,
    }


def test_another_resolution_is_drawn_and_a_broken_one_refused(teacher):
    subject = pipeline_subject("teacher", teacher, steps=1, resolution=48)
    assert subject.resolution == (48, 48)
    assert subject.draw(PROMPTS[:2], seed=0, indices=[0, 1]).shape == (2, 3, 48, 48)
    with pytest.raises(UserError, match="multiple of 4"):
        pipeline_subject("teacher", teacher, steps=1, resolution=42)


def test_a_network_without_sample_size_leaves_the_first_draw_to_its_pipeline(teacher):
    subject = pipeline_subject("teacher", teacher, steps=2)
    expected = subject.draw(PROMPTS, seed=0, indices=range(7))
    size, teacher.unet.config["sample_size"] = teacher.unet.config["sample_size"], None
    try:
        with pytest.raises(UserError, match="has no sample_size"):
            initial_latents(teacher, generators(0, [0]))
        subject = pipeline_subject("teacher", teacher, steps=2, resolution=32)
        found = subject.draw(PROMPTS, seed=0, indices=range(7))
    finally:
        teacher.unet.config["sample_size"] = size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_unconditional_pipeline_counts_its_prompts():
    pipeline = DDPMPipeline(unet=unconditional_unet(), scheduler=DDPMScheduler())  # stochastic
    subject = pipeline_subject("ddpm", pipeline, steps=3)
    whole = in_batches(subject, [""] * 5, 5)
    own = pipeline(batch_size=5, num_inference_steps=3, generator=generators(4, range(5)), output_type="np").images
    np.testing.assert_allclose(whole.permute(0, 2, 3, 1).numpy(), own, atol=1e-6)
    torch.testing.assert_close(in_batches(subject, [""] * 5, 2), whole, rtol=0, atol=1e-5)
    assert (subject.steps, subject.guidance_scale, subject.resolution) == (3, 1.0, (8, 8))
    with pytest.raises(UserError, match="takes no guidance_scale"):
        pipeline_subject("ddpm", pipeline, guidance_scale=2.0)


def test_prompts_of_a_class_conditional_pipeline_are_class_numbers():
    pipeline = tiny_dit()
    subject = pipeline_subject("dit", pipeline, steps=2, guidance_scale=1.5)
    images = in_batches(subject, ["3", "999", "3"], 3)
    own = pipeline([3, 999, 3], guidance_scale=1.5, num_inference_steps=2, generator=generators(4, range(3)), output_type="np")
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), own.images, atol=1e-6)
    torch.testing.assert_close(in_batches(subject, ["3", "999", "3"], 1), images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="class numbers such as 207"):
        subject.draw(["a boot"], seed=0, indices=[0])


def test_classes_of_a_pipeline_that_also_draws_without_them():
    network = unconditional_unet(num_class_embeds=10)
    pipeline = ConsistencyModelPipeline(unet=network, scheduler=CMStochasticIterativeScheduler())
    subject = pipeline_subject("cm", pipeline)
    images = in_batches(subject, ["3", "7"], 2)
    own = pipeline(2, class_labels=[3, 7], generator=generators(4, range(2)), output_type="np").images
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), own, atol=1e-6)
    torch.testing.assert_close(in_batches(subject, ["3", "7"], 1), images, rtol=0, atol=1e-5)


def test_the_identity_survives_a_move_and_every_change_changes_it(teacher, tmp_path):
    from diffusers import DiffusionPipeline

    before = pipeline_identity(teacher)
    teacher.save_pretrained(tmp_path / "a")
    again = DiffusionPipeline.from_pretrained(tmp_path / "a", use_safetensors=True)
    assert pipeline_identity(again) == before
    seen = {before}
    again.scheduler = EulerAncestralDiscreteScheduler.from_config(again.scheduler.config)
    seen.add(pipeline_identity(again))
    again.scheduler = EulerAncestralDiscreteScheduler.from_config(again.scheduler.config, timestep_spacing="leading")
    seen.add(pipeline_identity(again))
    with torch.no_grad():
        again.vae.decoder.conv_out.bias[0] += 1e-6
    seen.add(pipeline_identity(again))
    seen.add(pipeline_identity(again.to(torch.bfloat16)))
    again.tokenizer.add_tokens(["zebra"])
    seen.add(pipeline_identity(again))
    assert len(seen) == 6


def test_a_bare_call_that_guides_says_the_guidance_of_its_signature(teacher):
    assert pipeline_subject("dit", tiny_dit()).guidance_scale == 4.0
    assert pipeline_subject("teacher", teacher, steps=1).guidance_scale == 7.5
