"""Stored ODE pairs: what they are, and when a file of them may be used again."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tiny import tiny_pipeline, tiny_teacher

from fastdiff.data.pairs import Pairs, make_pairs
from fastdiff.data.prompts import PromptTable
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import ODEPairs
from fastdiff.trainers._regression import load_or_make_pairs
from fastdiff.trainers.method import Preparation

PROMPTS = ["a red boot on a white background", "a blue bag on a pink background", "a green coat on a black background"]
SETTINGS = {"n": 7, "seed": [0, 0], "guidance_scale": 3.0, "teacher": "abc"}


def made(teacher: Teacher, **options: object) -> Pairs:
    given = {"n": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0, **options}
    return make_pairs(teacher, PromptTable(PROMPTS, teacher), **given)


def same(a: Pairs, b: Pairs) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("noise", "x0", "prompt"))


# --- what they are


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_is_what_the_stock_pipeline_makes_of_the_same_noise(prediction_type: str, guidance_scale: float) -> None:
    teacher = tiny_teacher(prediction_type=prediction_type)
    pairs = made(teacher, guidance_scale=guidance_scale)
    stock = tiny_pipeline(prediction_type=prediction_type)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    want = stock(
        [PROMPTS[i] for i in pairs.prompt],
        latents=pairs.noise,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    assert (pairs.x0 - want).norm() < 1e-5 * want.norm()
    assert not torch.allclose(pairs.x0, pairs.noise, rtol=0.1)


def test_a_second_order_pair_is_nearer_to_the_limit_of_many_steps_and_is_diffusers_own() -> None:
    teacher = tiny_teacher()
    limit = made(teacher, num_inference_steps=200).x0
    first, second = (made(teacher, num_inference_steps=10, solver=solver).x0 for solver in ("ddim", "dpmpp_2m"))
    assert (second - limit).norm() < 0.5 * (first - limit).norm()
    pairs = made(teacher, num_inference_steps=10, solver="dpmpp_2m")
    stock = tiny_pipeline()
    options = {"timestep_spacing": "trailing", "lower_order_final": True, "final_sigmas_type": "zero", "steps_offset": 0}
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, **options)
    want = stock(
        [PROMPTS[i] for i in pairs.prompt], latents=pairs.noise, num_inference_steps=10, guidance_scale=3.0, output_type="latent"
    ).images
    assert (pairs.x0 - want).norm() < 1e-4 * want.norm()


def test_same_seed_same_pairs_whatever_the_batch() -> None:
    teacher = tiny_teacher()
    pairs, other = made(teacher), made(teacher, seed=1)
    assert same(pairs, made(teacher))
    assert not torch.equal(pairs.noise, other.noise)
    in_parts = made(teacher, batch_size=3)
    assert torch.equal(in_parts.noise, pairs.noise)
    assert torch.equal(in_parts.prompt, pairs.prompt)
    torch.testing.assert_close(in_parts.x0, pairs.x0, rtol=1e-4, atol=1e-4)


def test_prompts_come_in_balanced_rounds_and_progress_adds_up() -> None:
    told = []
    pairs = made(tiny_teacher(), n=25, batch_size=10, num_inference_steps=1, progress=told.append)
    assert sorted(torch.bincount(pairs.prompt).tolist()) == [8, 8, 9]
    assert all(len(set(part.tolist())) == len(part) for part in pairs.prompt.split(3))
    assert told == [10, 10, 5]
    assert len(pairs) == 25
    assert pairs.x0.dtype == torch.float32
    assert not pairs.x0.requires_grad


def test_the_teacher_makes_them_in_the_stated_number_of_calls() -> None:
    """Guided: two samples a step; unguided: one, and no null pass."""
    teacher, seen = tiny_teacher(), []
    teacher.pipeline.unet.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    made(teacher)
    assert seen == [14] * 4
    seen.clear()
    made(teacher, guidance_scale=1.0)
    assert seen == [7] * 4


# --- files


def test_a_file_comes_back_to_the_bit(tmp_path: Path) -> None:
    pairs, path = made(tiny_teacher(), num_inference_steps=1), tmp_path / "pairs.safetensors"
    pairs.save(path, SETTINGS)
    loaded = Pairs.load(path, dict(reversed(SETTINGS.items())))
    assert loaded is not None
    assert same(loaded, pairs)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.safetensors"]


@pytest.mark.parametrize("change", [{"seed": [1, 0]}, {"seed": [0, 1]}, {"guidance_scale": 3.5}, {"teacher": "abd"}, {"x": 1}])
def test_a_file_of_other_settings_is_not_used(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "pairs.safetensors"
    made(tiny_teacher(), num_inference_steps=1).save(path, SETTINGS)
    assert Pairs.load(path, {**SETTINGS, **change}) is None
    assert Pairs.load(path, {k: v for k, v in SETTINGS.items() if k != "n"}) is None


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_not_used(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "pairs.safetensors"
    made(tiny_teacher(), num_inference_steps=1).save(path, SETTINGS)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert Pairs.load(path, SETTINGS) is None
    assert Pairs.load(tmp_path / "missing.safetensors", SETTINGS) is None


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    pairs = made(tiny_teacher(), num_inference_steps=1)
    monkeypatch.setattr("fastdiff.data.pairs.save_file", full)
    with pytest.raises((OSError, ValueError), match="No space left"):
        pairs.save(tmp_path / "pairs.safetensors", SETTINGS)
    assert not list(tmp_path.iterdir())


# --- used again for equal settings only


def prepared(folder: Path, teacher: Teacher, made: list[str], **options: object) -> Pairs:
    method_options = {k: options.pop(k) for k in ("pair_steps", "pair_solver", "pair_guidance_scale") if k in options}
    prompts = options.pop("prompts", PROMPTS)

    def progress(label: str, total: int) -> object:
        made.append(label)
        return lambda done: None

    given = {"seed": 0, "rank": 0, "world_size": 1, "max_steps": 1, **options}
    preparation = Preparation(teacher=teacher, prompts=PromptTable(prompts, teacher), folder=folder, progress=progress, **given)
    return load_or_make_pairs(ODEPairs(pairs=6, **{"pair_steps": 3, **method_options}), preparation)


def test_equal_settings_use_the_file(tmp_path: Path) -> None:
    told: list[str] = []
    first = prepared(tmp_path, tiny_teacher(), told)
    again = prepared(tmp_path, tiny_teacher(), told)
    assert len(told) == 1
    assert same(first, again)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"pair_steps": 1},
        {"pair_solver": "ddim"},
        {"pair_guidance_scale": 1.0},
        {"prompts": PROMPTS[::-1]},
        {"world_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_make_new_pairs(tmp_path: Path, change: dict) -> None:
    told: list[str] = []
    first = prepared(tmp_path, tiny_teacher(), told)
    other = prepared(tmp_path, tiny_teacher(), told, **change)
    assert len(told) == 2
    assert not same(first, other)


def retrained_text_encoder() -> Teacher:
    teacher = tiny_teacher()
    for parameter in teacher.pipeline.text_encoder.parameters():
        parameter.data.mul_(1.5)
    return teacher


@pytest.mark.parametrize(
    "other",
    [lambda: tiny_teacher(seed=1), lambda: tiny_teacher(prediction_type="v_prediction"), retrained_text_encoder],
    ids=["other weights", "other prediction type", "other text encoder"],
)
def test_another_teacher_makes_new_pairs(tmp_path: Path, other: object) -> None:
    """A network under another prediction type, or told the prompts by another text encoder, gives another x0."""
    told: list[str] = []
    first = prepared(tmp_path, tiny_teacher(), told)
    second = prepared(tmp_path, other(), told)
    assert len(told) == 2
    assert not torch.equal(first.x0, second.x0)


def test_ranks_share_the_pairs_and_draw_their_own(tmp_path: Path) -> None:
    told: list[str] = []
    parts = [prepared(tmp_path, tiny_teacher(), told, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 3]
    assert not torch.equal(parts[0].noise, parts[1].noise)
    assert same(parts[0], prepared(tmp_path, tiny_teacher(), told, rank=0, world_size=2))
    assert len(told) == 2


def test_more_steps_than_times_are_refused() -> None:
    with pytest.raises(UserError, match="1001 steps"):
        made(tiny_teacher(), num_inference_steps=1001)
