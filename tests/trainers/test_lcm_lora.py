"""LCM-LoRA: what it adapts, its own output as target, and the files that other pipelines load."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file
from short_runs import shake, started, trainer
from tiny import tiny_teacher
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.pipelines.lora import KOHYA, LORA
from fastdiff.trainers import LCMLoRA
from fastdiff.trainers.lcm_lora import _ATTENTION, _OTHERS, _SAMPLERS
from fastdiff.trainers.method import Method

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "guided": LCMLoRA(guidance_scale=2.0, rank=4, **PAIRS),
    "squared-2-steps": LCMLoRA(guidance_scale=2.0, rank=4, steps=2, original_steps=20, distance="squared", lr=1e-3, **PAIRS),
}


def test_the_layers_of_the_sheet_are_adapted_and_no_others(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    plain = {name: m for name, m in teacher.family.backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    ends = (*_ATTENTION, *_OTHERS, *_SAMPLERS)
    wanted = {name for name in plain if name.endswith(tuple(f".{end}" for end in ends))}
    with started(LCMLoRA(rank=4, **PAIRS), tmp_path, teacher) as run:
        adapted = {key.rsplit(".lora_", 1)[0] for key in run._roles.adapter("student")}
        assert adapted == wanted
        kinds = Counter(next(end for end in ends if name.endswith(f".{end}")) for name in adapted)
        assert kinds.keys() == set(ends)
        assert plain.keys() - adapted == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_the_target_is_the_student_s_own_output_without_gradient(tmp_path: Path) -> None:
    """By hand; with a graph through both calls the gradient would be another one."""
    method = LCMLoRA(guidance_scale=2.0, rank=4, distance="squared", **PAIRS)
    with started(method, tmp_path) as run:
        shake(run)
        roles, batch = run._roles, run._micro_batches(0)[0]
        found = []
        for kept in (None, True, False):
            roles.train_only("student")
            loss = sum(method.loss("student", batch, roles).values()) if kept is None else by_hand(run, kept)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, roles.parameters("student"))]))
    got, detached, through = found
    assert (got - detached).norm() < 1e-5 * detached.norm()
    assert (got - through).norm() > 1e-2 * detached.norm()


def by_hand(run: object, detach: bool) -> Tensor:
    method, roles = run.method, run._roles  # type: ignore[attr-defined]
    batch = run._micro_batches(0)[0]  # type: ignore[attr-defined]
    process, student = roles.teacher.process, roles.denoiser("student")
    _, x0, cond = method.draw_pairs(batch)
    t = 20 * (batch.draws.integers("n", 0, 50) + 1) - 1
    u = t - 20
    assert (u > 0).all()
    x_t = process.add_noise(x0, batch.noise("eps"), t)
    with torch.no_grad():
        teacher = roles.denoiser("teacher")
        guided = {key: 2 * getattr(teacher(x_t, t, cond), key) - getattr(teacher(x_t, t, batch.null), key) for key in ("x0", "eps")}
        a, s = (c(u)[:, None, None, None].float() for c in (process.alpha, process.sigma))
        x_u = a * guided["x0"] + s * guided["eps"]
    aim = student(x_u, u, cond).x0
    return (student(x_t, t, cond).x0 - (aim.detach() if detach else aim)).square().mean()


def test_the_adapter_files_make_of_the_teacher_s_pipeline_what_was_trained(tmp_path: Path) -> None:
    """load_lora_weights and LCMScheduler alone, from the diffusers file and from the kohya one; and the teacher is as it was."""
    teacher = tiny_teacher()
    base = copy.deepcopy(teacher.pipeline)
    method = LCMLoRA(rank=4, lr=3e-2, **PAIRS)
    run = trainer(method, tmp_path, teacher, max_steps=6, warmup_steps=0)
    run.train()
    prompts, noise, images = run.samples
    assert len(load_file(tmp_path / LORA)) == 2 * len([k for k in load_file(tmp_path / KOHYA) if k.endswith(".alpha")])

    def draw() -> Tensor:
        draws = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        made = base(prompts, latents=noise, generator=draws, num_inference_steps=4, guidance_scale=1.0, output_type="pt")
        return made.images

    base.scheduler = LCMScheduler.from_config(base.scheduler.config)
    without = draw()
    assert (without - images).abs().max() > 1e-2
    for name in (None, LORA, KOHYA):  # no name: diffusers finds its own file among the folder's others
        base.load_lora_weights(str(tmp_path), weight_name=name)
        assert (draw() - images).abs().max() < 1e-5, name
        base.unload_lora_weights()
    assert torch.equal(draw(), without)
    assert f'load_lora_weights("path/to/this/folder", weight_name="{LORA}")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("fields", [{"guidance_scale": 0.5}, {"rank": 0}, {"steps": 60}])
def test_settings_that_cannot_work_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        LCMLoRA(**fields)  # type: ignore[arg-type]
