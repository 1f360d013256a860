"""SwiftBrush v2: the clamped CLIP term, who is asked what, and the LoRA student."""

from pathlib import Path

import pytest
import torch
from short_runs import distance, gradients, shake, started, trainer
from tiny import tiny_teacher
from torch import Tensor, nn

from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.errors import UserError
from fastdiff.models.clip import load_clip
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import SwiftBrush, SwiftBrushV2
from fastdiff.trainers.method import Method

TINY = {"rank": 4, "lora_alpha": 8.0, "student_rank": 4, "student_lora_alpha": 8.0, "pairs": 12, "pair_steps": 2}
CLIP = {"clip_threshold": 0.9, "clip_decay_steps": 50}
VARIANTS: dict[str, Method] = {
    "clip": SwiftBrushV2(null_probability=0.0, warm_start_steps=2, **CLIP, **TINY),
    "lora": SwiftBrushV2(student="lora", null_probability=1.0, clip_weight=0.0, **TINY),
}


class Fixed:
    """A CLIP with the given cosines, of slope 1 in the mean of each image; remembers what it was asked."""

    def __init__(self, cosines: list[float]) -> None:
        self.cosines, self.asked = torch.tensor(cosines), list[list[str]]()

    def __repr__(self) -> str:
        return "Fixed"

    def __deepcopy__(self, memo: object) -> "Fixed":
        return self

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        self.asked.append(texts)
        mean = images.mean(dim=(1, 2, 3))
        return self.cosines.to(mean) + mean - mean.detach()


def clip_gradient(cosines: list[float], folder: Path, **fields: object) -> tuple[float, Tensor]:
    """The CLIP term of four samples with these cosines, and its gradient for each sample [4, ...]."""
    with started(SwiftBrushV2(clip=Fixed(cosines), **TINY, **fields), folder) as run:
        x = 0.1 * run._micro_batches(0)[0].noise("z")
        x.requires_grad_()
        term = run.method.added(x, run._micro_batches(0)[0])["clip"]
        (gradient,) = torch.autograd.grad(term, x)
        return term.item(), gradient


def test_an_image_that_fits_its_text_by_tau_has_no_gradient(tmp_path: Path) -> None:
    term, gradient = clip_gradient([0.35, 0.36, 0.9, 0.05], tmp_path)
    assert term == pytest.approx(0.1 * (0.35 - 0.05) / 4, rel=1e-5)
    assert torch.equal(gradient[1:3], torch.zeros_like(gradient[1:3]))
    assert gradient[3].abs().max() > 0


def test_every_sample_is_held_against_its_own_prompt(tmp_path: Path) -> None:
    clip = Fixed([0.0] * 4)
    with started(SwiftBrushV2(clip=clip, **TINY), tmp_path) as run:
        batch = run._micro_batches(0)[0]
        run.method.loss("student", batch, run._roles)
        (texts,) = clip.asked
        assert len(texts) == len(batch) == 4
        assert len(set(texts)) > 1
        assert torch.equal(run.teacher.encode(texts), batch.cond)


def test_the_term_is_the_cosine_of_the_decoded_sample(tmp_path: Path) -> None:
    """By the bundled CLIP, asked again outside of the method."""
    with started(SwiftBrushV2(**CLIP, **TINY), tmp_path) as run:
        shake(run)
        batch = run._micro_batches(0)[0]
        term = run.method.loss("student", batch, run._roles)["clip"].item()
        texts = [run.prompts.prompts[i] for i in batch.draws.integers("prompts", 0, len(run.prompts)).tolist()]
        cosine = load_clip("fashion")(run.teacher.decode(batch.memo["x"]), texts)
    assert term == pytest.approx((0.1 * (0.9 - cosine).clamp(min=0).mean()).item(), rel=1e-5)
    assert cosine.std() > 1e-3


def test_the_weight_falls_linearly_from_its_start_to_nothing_and_then_nobody_is_asked(tmp_path: Path) -> None:
    method = SwiftBrushV2(clip_weight=0.1, clip_decay_steps=4, warm_start_steps=2)
    weights = [0.1, 0.075, 0.05, 0.025, 0, 0, 0]
    assert [method.clip_weight_at(step) for step in range(2, 9)] == pytest.approx(weights)
    waits = SwiftBrushV2(clip_weight=0.1, clip_decay_steps=4, warm_start_steps=2, fake_score_warmup=50)
    assert [waits.clip_weight_at(step) for step in range(52, 59)] == pytest.approx(weights)  # the student waits, and so does w
    clip = Fixed([0.0] * 4)
    with started(SwiftBrushV2(clip=clip, clip_decay_steps=2, **TINY), tmp_path) as run:
        for _ in range(4):
            run.advance()
    assert len(clip.asked) == 2


def test_without_the_term_a_full_student_is_swiftbrush(tmp_path: Path) -> None:
    found = []
    for method in (SwiftBrushV2(clip_weight=0.0, **TINY), SwiftBrush(lora_alpha=8.0, rank=4)):
        with started(method, tmp_path / method.name()) as run:
            shake(run)
            found.append(gradients(run))
    for key, gradient in found[0].items():
        assert torch.equal(gradient.nan_to_num(), found[1][key].nan_to_num())


def test_the_decoder_and_the_clip_get_no_gradient_of_their_own(tmp_path: Path) -> None:
    with started(SwiftBrushV2(**CLIP, **TINY), tmp_path) as run:
        run._backward("student", run._micro_batches(0), ("student",))
        frozen = [*run.teacher.pipeline.vae.parameters(), *run.method._clip.model.parameters()]
        assert frozen
        assert all(p.grad is None and not p.requires_grad for p in frozen)
        assert all(not module.training for module in run.method._clip.model.modules())


def test_a_lora_student_trains_its_adapter_alone_and_its_export_is_a_stock_network(tmp_path: Path) -> None:
    run = trainer(SwiftBrushV2(student="lora", clip_weight=0.0, **TINY), tmp_path, max_steps=2)
    before = run.teacher.weights_hash()
    pipeline = run.train()
    assert run.teacher.weights_hash() == before
    own, merged = run.teacher.family.backbone.state_dict(), pipeline.unet.state_dict()
    assert own.keys() <= merged.keys()
    changed = {key for key, value in own.items() if not torch.equal(value, merged[key])}
    assert changed
    assert all("attn" in key for key in changed)


def test_a_teacher_that_no_clip_can_look_at_is_refused(tmp_path: Path) -> None:
    vectors = Teacher.from_module(nn.Linear(3, 3), RectifiedFlow(), "flow_prediction", shape=(3,), name="vectors")
    with pytest.raises(UserError, match=r"vectors decodes to \(3,\), no RGB picture"):
        SwiftBrushV2().validate(vectors)
    SwiftBrushV2(clip_weight=0.0).validate(vectors)
    stranger = Teacher(tiny_teacher().pipeline, name="stranger")
    with pytest.raises(UserError, match="bundled CLIP knows the pictures of the teacher fashion only"):
        SwiftBrushV2().validate(stranger)
    SwiftBrushV2(clip=Fixed([0.0])).validate(stranger)


def test_the_term_reaches_the_student_beside_vsd(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 0.1, 0.3):
        with started(SwiftBrushV2(clip_weight=weight, **CLIP, **TINY), tmp_path / str(weight)) as run:
            shake(run)
            found[weight] = gradients(run)["0 student student"]
    assert distance(found[0.1], found[0.0]) > 1e-4
    assert distance(found[0.3] - found[0.0], 3 * (found[0.1] - found[0.0])) < 1e-2
