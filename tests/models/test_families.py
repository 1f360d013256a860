"""Each family against its own pipeline: the same calls, the same images; heads, taps and refusals."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from families import IMAGES, TEACHERS, family_teacher, flux_pipeline, sdxl_pipeline
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.discriminator import features_at
from fastdiff.models.families import FAMILIES
from fastdiff.models.families.flux import pack, unpack
from fastdiff.models.teacher import Teacher

PROMPTS = ["a red boot", "bags"]
each_family = pytest.mark.parametrize("name", TEACHERS)


def noise_of(teacher: Teacher, n: int = 2) -> Tensor:
    return torch.randn(n, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def test_every_family_is_here() -> None:
    assert {type(family_teacher(name).family) for name in TEACHERS} == set(FAMILIES)


@each_family
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_s_own_steps_make_the_images_of_its_pipeline(name: str, scale: float) -> None:
    """Three steps of the pipeline's scheduler, the network asked through the family: conditions, times, output, guidance."""
    teacher = family_teacher(name)
    guided = scale if "flux" not in name else 1.0  # its scale is embedded, and its own call has no unconditional pass
    call = {"num_inference_steps": 3, "guidance_scale": scale, **teacher.family.call}
    noise = noise_of(teacher)
    made = teacher.pipeline(PROMPTS, latents=teacher.family.drawn_from(noise), output_type="pt", **call)
    expected = made.frames if hasattr(made, "frames") else made.images
    cond, null, x = teacher.encode(PROMPTS), teacher.encode(["", ""]), noise
    scheduler = teacher.pipeline.scheduler  # as the call left it
    scheduler._step_index = None
    if hasattr(scheduler, "model_outputs"):  # a multistep one remembers its last steps
        scheduler.set_timesteps(3)
    for time in scheduler.timesteps:
        t = (time / 1000 if teacher.prediction_type == "flow_prediction" else time).expand(2)
        with torch.no_grad():
            output = teacher.denoiser.guided(x, t, cond, null, guided).output(teacher.prediction_type)
        x = scheduler.step(output, time, x, return_dict=False)[0]
    assert (teacher.decode(x) - expected).abs().max() < 2e-5


@each_family
def test_conditions_are_rows_of_a_batch_and_the_prompt_is_heard(name: str) -> None:
    from fastdiff.models.condition import concat, take

    teacher = family_teacher(name)
    x, t = noise_of(teacher), teacher.process.at_level(torch.tensor([700, 700]))
    cond, network = teacher.encode(PROMPTS), teacher.family.network(teacher.family.backbone)
    with torch.no_grad():
        both = network(x, teacher.process.network_time(t), cond)
        one = network(x[1:], teacher.process.network_time(t[1:]), take(cond, slice(1, 2)))
        again = network(x, teacher.process.network_time(t), concat(take(cond, slice(1, 2)), take(cond, slice(0, 1))))
    assert both.shape == x.shape
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)
    assert (both[0] - again[0]).abs().max() > 1e-6


@pytest.mark.parametrize("name", IMAGES)
def test_a_discriminator_has_features_to_look_at(name: str) -> None:
    teacher = family_teacher(name)
    backbone, x = teacher.family.backbone, noise_of(teacher).requires_grad_()
    call = teacher.family.network(backbone)
    t = teacher.process.network_time(teacher.process.at_level(torch.tensor([300, 300])))
    features = features_at(teacher.family.bottleneck(backbone), lambda: call(x, t, teacher.encode(PROMPTS)))
    logits = teacher.family.head()(features)
    assert logits.shape == (2,)
    (gradient,) = torch.autograd.grad(logits[0], x)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


@each_family
def test_the_embedded_time_has_the_width_that_is_told(name: str) -> None:
    teacher = family_teacher(name)
    layer, width = teacher.family.time_embedding(teacher.family.backbone)
    call = teacher.family.network(teacher.family.backbone)
    t = teacher.process.network_time(teacher.process.at_level(torch.tensor([300, 301])))
    found = features_at(layer, lambda: call(noise_of(teacher), t, teacher.encode(PROMPTS)))
    assert found.shape == (2, width)
    assert not torch.equal(found[0], found[1])


def test_packing_is_the_pipeline_s_and_its_inverse_is_exact() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    pipeline = flux_pipeline()
    assert torch.equal(pack(x), pipeline._pack_latents(x, 2, 3, 4, 6))
    assert torch.equal(unpack(pack(x), 4, 6), x)


def test_a_guidance_embedded_network_is_told_the_pipeline_s_scale_and_its_students_call_says_so() -> None:
    assert family_teacher("flux").family.call["guidance_scale"] == 3.5
    assert "guidance_scale" not in family_teacher("flux-schnell").family.call


def test_the_empty_prompt_of_sdxl_is_zero_where_its_pipeline_says_so() -> None:
    teacher = family_teacher("sdxl")
    assert teacher.null["text"].abs().max() == 0
    assert teacher.null["pooled"].abs().max() == 0
    assert teacher.null["sizes"].tolist() == [[16, 16, 0, 0, 16, 16]]
    pipeline = sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert Teacher(pipeline, name="sdxl").null["text"].abs().max() > 0


@pytest.mark.parametrize("name", ["pixart", "sdxl", "sd3", "flux"])
def test_a_scheduler_of_another_kind_of_process_is_refused(name: str) -> None:
    pipeline = TEACHERS[name][0]()
    flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    pipeline.scheduler = DDIMScheduler() if flow else FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="would be run at times it never saw"):
        Teacher(pipeline, name=name)


def test_a_size_is_of_families_whose_network_knows_none_and_part_of_what_the_teacher_is() -> None:
    with pytest.raises(UserError, match="has the size of its network, and not height"):
        Teacher(sdxl_pipeline(), name="sdxl", size={"height": 32})
    with pytest.raises(UserError, match="takes height, width, and not num_frames"):
        Teacher(flux_pipeline(), name="flux", size={"num_frames": 9})
    small, large = (Teacher(flux_pipeline(), name="flux", size={"height": side, "width": 32}) for side in (16, 32))
    assert (small.latent_shape, large.latent_shape) == ((4, 8, 16), (4, 16, 16))
    assert small.identity() != large.identity()
