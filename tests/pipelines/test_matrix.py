"""Every family of teachers by methods of every kind: two updates, export, and the folder in a process without fastdiff.

The folders of a third of the methods are verified by one such process, which is what takes the time. ``REFUSED`` says what does
not go together.
"""

from pathlib import Path
from typing import Any

import pytest
from families import TEACHERS, family_teacher, prompts_of

import fastdiff.pipelines.export as export
from fastdiff import Trainer
from fastdiff.errors import UserError
from fastdiff.pipelines.export import Exported, verify_exports
from fastdiff.trainers import DMD2, LCM, PCM, SCM, TCD, TDM, Consistency, LCMLoRA, Shortcut, SwiftBrush
from fastdiff.trainers.method import Method

_PAIRS: dict[str, Any] = {"pairs": 8, "pair_steps": 2}
METHODS: dict[str, Method] = {
    "swiftbrush": SwiftBrush(rank=2, **_PAIRS),
    "dmd2-gan": DMD2(gan_weight=0.01, **_PAIRS),
    "tdm": TDM(start=1000),
    "lcm-one-step": LCM(steps=1, guidance_range=(2.0, 2.0), **_PAIRS),
    "lcm": LCM(steps=4, original_steps=40, guidance_range=(2.0, 2.0), **_PAIRS),
    "lcm-told": LCM(steps=2, guidance_range=(2.0, 4.0), **_PAIRS),
    "lcm-lora": LCMLoRA(steps=1, rank=2, **_PAIRS),
    "tcd": TCD(steps=2, guidance_range=(2.0, 2.0), **_PAIRS),
    "tcd-eta-0": TCD(steps=2, eta=0.0, guidance_range=(2.0, 2.0), **_PAIRS),
    "tcd-eta-1": TCD(steps=2, eta=1.0, guidance_range=(2.0, 2.0), **_PAIRS),
    "pcm": PCM(steps=2, guidance_range=(2.0, 2.0), **_PAIRS),
    "consistency": Consistency(steps=1, **_PAIRS),
    "shortcut": Shortcut(steps=2, bootstrap_share=0.5, **_PAIRS),
    "scm": SCM(jvp="one-sided", **_PAIRS),
}
NO_NOISE = "hands its scheduler no generators"
NOT_TOLD = "has no network that is told its guidance scale"
NO_BOTTLENECK = "has no bottleneck for a discriminator"
REFUSED = {
    **{(family, "dmd2-gan"): NO_BOTTLENECK for family in ("wan", "ltx")},
    **{(family, name): "does not run TCDScheduler" for family in ("dit", "ddpm") for name in ("tcd", "tcd-eta-0")},
    **{(family, "tcd-eta-1"): NO_NOISE for family in ("sd3", "flux", "flux-schnell", "wan", "ltx")},
    **{(family, "tcd-eta-1"): "does not run TCDScheduler" for family in ("dit", "ddpm")},
    **{(family, "tcd"): "Give eta=0 or eta=1" for family in ("sana", "sd3", "flux", "flux-schnell", "wan", "ltx")},
    **{(family, "lcm"): NO_NOISE for family in ("sd3", "flux", "flux-schnell", "wan", "ltx", "dit", "ddpm")},
    **{
        (family, name): NOT_TOLD
        for family in ("sd3", "flux", "flux-schnell", "pixart", "pixart-sigma", "sana", "wan", "ltx", "dit", "ddpm")
        for name in ("lcm-told", "shortcut")
    },
}


@pytest.mark.parametrize("part", range(3))
def test_students_of_every_family_work_in_plain_diffusers(part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exported: dict[Path, Exported] = {}

    def kept(folder: Path, *given: Any) -> float:
        exported[folder] = Exported(folder, *given)
        return 0.0

    monkeypatch.setattr(export, "verify_export", kept)
    trained = [(family, name) for name in list(METHODS)[part::3] for family in TEACHERS if (family, name) not in REFUSED]
    for family, name in trained:
        run(family, name, tmp_path / f"{family} {name}")
    assert len(exported) == len(trained)
    differences = dict(zip(exported, verify_exports(list(exported.values())), strict=True))
    assert max(differences.values()) < 1e-5, differences


def run(family: str, name: str, folder: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "validate_every": 0, "warmup_steps": 0}
    Trainer(METHODS[name], family_teacher(family), prompts=prompts_of(family), output_dir=folder, **options).train()


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(family: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED[family, name]):
        run(family, name, tmp_path)
