import pytest
import torch
from torch import Tensor, nn

from fastdiff.data.fashion import random_captions
from fastdiff.eval.cost import count_calls
from fastdiff.eval.evaluate import Subject, evaluate, initial_latents, noise, pipeline_subject

PROMPTS = random_captions(7, 0)


def brightness(images: Tensor, captions: list[str]) -> dict[str, float]:
    assert len(images) == len(captions)
    return {"brightness": images.mean().item()}


def grey(prompts: list[str], generator: torch.Generator) -> Tensor:
    return torch.rand(len(prompts), 1, 1, 1, generator=generator).expand(-1, 3, 8, 8)


def test_a_plain_function_is_a_subject():
    finished: list[int] = []
    result = evaluate(Subject(name="grey", generate=grey), PROMPTS, brightness, batch_size=3, repeats=1, progress=finished.append)
    expected = torch.cat([grey(PROMPTS[a:b], noise(0, i)) for i, (a, b) in enumerate([(0, 3), (3, 6), (6, 7)])])
    assert result.images.equal(expected)
    assert result.metrics["brightness"] == pytest.approx(expected.mean().item())
    assert finished == [3, 3, 1]
    assert (result.n, result.nfe, result.prompts) == (7, None, PROMPTS)


def test_row_has_quality_between_identity_and_cost():
    row = evaluate(Subject(name="grey", generate=grey), PROMPTS, brightness, repeats=2).row()
    assert list(row) == [
        "model",
        "steps",
        "nfe",
        "guidance_scale",
        "brightness",
        "latency_ms_p50",
        "latency_ms_p95",
        "images_per_s",
        "peak_memory_mib",
        "n",
    ]
    assert 0 < row["latency_ms_p50"] <= row["latency_ms_p95"]
    assert row["images_per_s"] > 0
    assert row["peak_memory_mib"] > 50  # a Python process with torch


def test_only_the_images_of_the_row_are_counted():
    network = nn.Conv2d(3, 3, 1)

    def generate(prompts: list[str], generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return network(torch.zeros(len(prompts), 3, 8, 8)).sigmoid()

    result = evaluate(Subject(name="net", generate=generate, network=network), PROMPTS, brightness, repeats=3)
    assert result.nfe == 1  # neither warm-up nor the timed calls


def test_seeds_change_the_noise_and_batches_differ():
    draws = [torch.randn(4, generator=noise(seed, batch)) for seed in (0, 1) for batch in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    assert draws[0].equal(torch.randn(4, generator=noise(0, 0)))
    assert not draws[0].equal(torch.randn(4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((7, 3, 8, 8), torch.nan), "7 of 7 images of bad are not finite"),
        (torch.full((7, 3, 8, 8), -1.0), r"not in \[0, 1\]"),
        (torch.zeros(6, 3, 8, 8), "one image a prompt"),
        (torch.zeros(7, 4, 8, 8), "one image a prompt"),
    ],
)
def test_images_that_would_score_nonsense_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Subject(name="bad", generate=lambda prompts, generator: images), PROMPTS, brightness, repeats=1)


def test_pipelines_start_from_the_same_noise(teacher, student):
    seen: list[Tensor] = []
    for pipeline, options in ((teacher, {"steps": 2, "guidance_scale": 3.0}), (teacher, {"steps": 1}), (student, {})):
        subject = pipeline_subject("x", pipeline, **options)
        first: list[Tensor] = []
        hook = pipeline.unet.register_forward_pre_hook(lambda module, args, kept=first: kept.append(args[0]))
        subject.generate(PROMPTS, noise(0, 0))
        hook.remove()
        seen.append(first[0][: len(PROMPTS)])
    assert seen[0].equal(initial_latents(teacher, len(PROMPTS), noise(0, 0)))
    assert all(x.equal(seen[0]) for x in seen)


def test_the_same_subject_draws_the_same_images_twice(teacher):
    subject = pipeline_subject("teacher", teacher, steps=2, guidance_scale=3.0)
    assert subject.generate(PROMPTS, noise(3, 0)).equal(subject.generate(PROMPTS, noise(3, 0)))


def test_images_are_those_of_the_pipelines_own_call(teacher):
    images = pipeline_subject("teacher", teacher, steps=2, guidance_scale=3.0).generate(PROMPTS, noise(0, 0))
    own = teacher(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=initial_latents(teacher, len(PROMPTS), noise(0, 0)),
        output_type="np",
    ).images
    torch.testing.assert_close(images.permute(0, 2, 3, 1), torch.from_numpy(own), rtol=0, atol=1e-6)


def test_names_steps_and_guidance_are_measured_on_a_bare_call(teacher, student):
    bare = pipeline_subject("student", student)
    assert (bare.name, bare.steps, bare.guidance_scale) == ("student (1 step)", 1, 1.0)
    given = pipeline_subject("teacher", teacher, steps=3, guidance_scale=2.5)
    assert (given.name, given.steps, given.guidance_scale) == ("teacher (3 steps)", 3, 2.5)


def test_network_calls_of_rows(teacher, student):
    guided = pipeline_subject("teacher", teacher, steps=3, guidance_scale=2.0)
    assert evaluate(guided, PROMPTS, brightness, batch_size=3, repeats=1).nfe == 6
    assert evaluate(pipeline_subject("student", student), PROMPTS, brightness, batch_size=3, repeats=1).nfe == 1


def test_a_network_without_sample_size_is_refused(teacher):
    size, teacher.unet.config["sample_size"] = teacher.unet.config["sample_size"], None
    try:
        with pytest.raises(ValueError, match="write a Subject"):
            pipeline_subject("teacher", teacher, steps=1)
    finally:
        teacher.unet.config["sample_size"] = size


def test_counting_survives_a_failing_subject(teacher):
    before = len(teacher.unet._forward_hooks)
    subject = pipeline_subject("teacher", teacher, steps=1)
    with pytest.raises(ZeroDivisionError):
        evaluate(subject, PROMPTS, lambda images, captions: {"x": 1 / 0}, repeats=1)
    with count_calls(teacher.unet):
        assert len(teacher.unet._forward_hooks) == before + 1
