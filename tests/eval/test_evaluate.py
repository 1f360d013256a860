import pytest
import torch
from torch import Tensor, nn

from fastdiff.data.fashion import random_captions
from fastdiff.errors import UserError
from fastdiff.eval.cost import count_calls
from fastdiff.eval.evaluate import evaluate
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.eval.subject import Subject, prompts_hash

PROMPTS = random_captions(7, 0)


def brightness(images: Tensor, captions: list[str]) -> dict[str, float]:
    assert len(images) == len(captions)
    return {"brightness": images.mean().item()}


def grey(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
    return torch.cat([torch.rand(1, 1, 1, 1, generator=g) for g in generators]).expand(-1, 3, 8, 8)


def test_a_plain_function_is_a_subject_whose_images_no_batch_changes():
    finished: list[int] = []
    subject = Subject(name="grey", generate=grey)
    result = evaluate(subject, PROMPTS, brightness, batch_size=3, repeats=1, progress=finished.append)
    expected = subject.draw(PROMPTS, seed=0, indices=range(7))
    assert len(set(expected[:, 0, 0, 0].tolist())) == 7
    assert result.images.equal(expected)
    assert result.metrics["brightness"] == pytest.approx(expected.mean().item())
    assert finished == [3, 3, 1]
    assert (result.n, result.nfe, result.prompts) == (7, None, PROMPTS)
    assert evaluate(subject, PROMPTS, brightness, batch_size=1, repeats=1).images.equal(expected)
    assert not evaluate(subject, PROMPTS, brightness, seed=1, repeats=1).images.equal(expected)


def test_row_has_quality_between_identity_and_cost():
    row = evaluate(Subject(name="grey", generate=grey), PROMPTS, brightness, repeats=2).row()
    costs = "latency_ms_p50 latency_ms_p95 images_per_s peak_memory_mib energy_j parameters_m pipeline_parameters_m size_mb"
    assert list(row) == ["model", "steps", "nfe", "guidance_scale", "brightness", *costs.split(), "n"]
    assert 0 < row["latency_ms_p50"] <= row["latency_ms_p95"]
    assert row["images_per_s"] > 0
    assert row["peak_memory_mib"] > 50  # a Python process with torch
    assert row["energy_j"] is row["parameters_m"] is row["pipeline_parameters_m"] is row["size_mb"] is None


def test_only_the_images_of_the_row_are_counted():
    network = nn.Conv2d(3, 3, 1)

    def generate(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        with torch.no_grad():
            return network(torch.zeros(len(prompts), 3, 8, 8)).sigmoid()

    result = evaluate(Subject(name="net", generate=generate, network=network), PROMPTS, brightness, repeats=3)
    assert result.nfe == 1  # neither warm-up nor the timed calls
    assert result.parameters_m == 12e-6


def test_stored_images_are_read_in_order_and_nothing_of_them_is_timed():
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: list[list[int]] = []

    def stored(ids: Tensor) -> Tensor:
        asked.append(ids.tolist())
        return images[ids]

    known = {"nfe": 4.0, "images_per_s": 2.5, "size_mb": 1.5}
    subject = Subject(name="folder", stored=stored, steps=4, prompts_sha256=prompts_hash(PROMPTS), known=known)
    result = evaluate(subject, PROMPTS, brightness, batch_size=4)
    assert result.images.equal(images)
    assert asked == [[0, 1, 2, 3], [4, 5, 6]]
    assert (result.nfe, result.images_per_s, result.size_mb, result.steps) == (4.0, 2.5, 1.5, 4)
    assert result.latency_ms_p50 is result.peak_memory_mib is None
    with pytest.raises(UserError, match="drawn for other prompts"):
        evaluate(subject, PROMPTS[::-1], brightness)
    with pytest.raises(UserError, match="than these 6"):
        evaluate(subject, PROMPTS[:6], brightness)


def test_a_subject_draws_or_has_its_images():
    for options in ({}, {"generate": grey, "stored": lambda ids: torch.zeros(len(ids), 3, 8, 8)}):
        with pytest.raises(ValueError, match="exactly one of generate and stored"):
            Subject(name="x", **options)


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
        evaluate(Subject(name="bad", generate=lambda prompts, generators: images), PROMPTS, brightness, repeats=1)


def test_network_calls_of_rows(teacher, student):
    guided = pipeline_subject("teacher", teacher, steps=3, guidance_scale=2.0)
    assert evaluate(guided, PROMPTS, brightness, batch_size=3, repeats=1).nfe == 6
    assert evaluate(pipeline_subject("student", student), PROMPTS, brightness, batch_size=3, repeats=1).nfe == 1


def test_counting_survives_a_failing_subject(teacher):
    before = len(teacher.unet._forward_hooks)
    subject = pipeline_subject("teacher", teacher, steps=1)
    with pytest.raises(ZeroDivisionError):
        evaluate(subject, PROMPTS, lambda images, captions: {"x": 1 / 0}, repeats=1)
    with count_calls(teacher.unet):
        assert len(teacher.unet._forward_hooks) == before + 1
