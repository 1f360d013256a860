"""The protocol of the bundled world: teacher, student and real photographs in one table.

FD[fashion] is the Frechet distance of the bundled classifier's 32 features to those of the 10,000 photographs of the
test split in random colours. A Frechet distance has a bias that depends on n, so all rows have the same n, and the real
row shows the floor at that n. All generators draw the same prompts from the same initial noise.

>>> results = fashion_rows(student, teacher, guidance_scale=3.0)
>>> [(r.model, r.metrics["fd"], r.nfe) for r in results]
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdiff.data.fashion import ASSETS, GARMENTS, colourise, parse, random_captions
from fastdiff.eval.attributes import attribute_score
from fastdiff.eval.classifier import FashionClassifier
from fastdiff.eval.clip import ClipScore
from fastdiff.eval.duplicates import duplicates
from fastdiff.eval.evaluate import Metric, Result, evaluate, scored
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.eval.scores import FeatureReference, Scores, feature_scores
from fastdiff.eval.stats import Stats

REFERENCE, REAL = ASSETS / "fashion-reference.safetensors", ASSETS / "fashion-real.safetensors"
FEATURES = ASSETS / "fashion-reference-features.safetensors"
Progress = Callable[[float, str], None]


def extractor_name(network: nn.Module) -> str:
    """A feature network's class and the first eight hex digits of the SHA-256 of its weights."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"{type(network).__name__}#{digest.hexdigest()[:8]}"


@torch.inference_mode()
def features(images: Tensor, classifier: FashionClassifier, *, batch_size: int = 250) -> Tensor:
    """Penultimate features [N, 32] of images [N, 3, 32, 32] in [0, 1]."""
    return torch.cat([classifier.features(part) for part in images.split(batch_size)])


@dataclass(frozen=True)
class FashionMetrics:
    """All scores of the classifier's features, CLIP score and attribute score, and the distance of each garment.

    ``n_duplicates`` counts perceptual duplicates, where a collapse shows first.
    """

    classifier: FashionClassifier
    reference: FeatureReference
    clip: ClipScore

    @classmethod
    def load(cls) -> "FashionMetrics":
        """The bundled networks and reference; its features are of photographs that no row of real images shows."""
        stored = load_file(FEATURES)
        garments = [GARMENTS[i] for i in stored["garment"].tolist()]
        reference = FeatureReference.of(Stats.load(REFERENCE), features=stored["features"].float(), groups=garments)
        return cls(FashionClassifier.load(), reference, ClipScore())

    def __call__(self, images: Tensor, captions: list[str]) -> Scores:
        garments = [GARMENTS[parse(caption).garment] for caption in captions]
        found, name = features(images, self.classifier), extractor_name(self.classifier)
        scores = feature_scores(found, self.reference, extractor=name, groups=garments)
        clip, attribute = self.clip(images, captions), attribute_score(images, captions, self.classifier)
        of_captions = {"clip": clip.value, "clip_se": clip.se, "attributes": attribute.value, "attributes_se": attribute.se}
        return scores | {**of_captions, "n_duplicates": duplicates(images)}


def real_images(prompts: list[str], *, bank: str | Path = REAL) -> Tensor:
    """A held-out photograph for each prompt: its garment, none twice, in the colours that the prompt asks for.

    The bank has 250 photographs a garment of the test split; they are among the 10,000 of the reference statistics,
    which wear other colours. ``ValueError`` when a garment is asked for more often than the bank has it.
    """
    photographs, asked = load_file(bank), [parse(prompt) for prompt in prompts]
    index = torch.empty(len(asked), dtype=torch.long)
    garment = torch.tensor([a.garment for a in asked])
    for g in range(len(GARMENTS)):
        wanted, stored = (garment == g).nonzero()[:, 0], (photographs["garment"] == g).nonzero()[:, 0]
        if len(wanted) > len(stored):
            raise ValueError(f"{len(wanted)} prompts ask for a {GARMENTS[g]} and {bank} has {len(stored)}: take fewer prompts.")
        index[wanted] = stored[: len(wanted)]
    grey = torch.nn.functional.pad(photographs["grey"][index].float() / 255, (2, 2, 2, 2))
    return colourise(grey, torch.tensor([a.foreground for a in asked]), torch.tensor([a.background for a in asked]))


def fashion_rows(
    student: Any,
    teacher: Any,
    *,
    n: int = 2000,
    seed: int = 0,
    guidance_scale: float = 3.0,
    teacher_steps: Sequence[int] = (25, 1),
    metric: Metric | None = None,
    bank: str | Path = REAL,
    batch_size: int = 250,
    repeats: int = 20,
    progress: Progress | None = None,
) -> list[Result]:
    """Evaluate the teacher, the student and real photographs on ``n`` prompts of the world.

    Args:
        student: the diffusers pipeline of a student, called bare, or a mapping from a name to a pipeline for several.
        teacher: the teacher's pipeline, or None to leave its rows out.
        seed: of the prompts and the initial noise.
        guidance_scale: of the teacher, at every number of steps.
        metric: quality columns; None is the bundled ``FashionMetrics``.
        progress: called with the share of the work that is done and the row in work.

    Returns:
        Rows "teacher (25 steps)", "teacher (1 step)", "student (1 step)" and "real (held-out)"; students of a mapping
        are called "student NAME (1 step)".
    """
    prompts, metric = random_captions(n, seed), metric or FashionMetrics.load()
    held_out = real_images(prompts, bank=bank)
    students = {f"student {k}": v for k, v in student.items()} if isinstance(student, dict) else {"student": student}
    steps = teacher_steps if teacher is not None else ()
    subjects = [pipeline_subject("teacher", teacher, steps=k, guidance_scale=guidance_scale) for k in steps]
    subjects += [pipeline_subject(name, pipeline) for name, pipeline in students.items()]
    calls = [n * (1 + (s.steps or 1) * (1 if s.guidance_scale == 1 else 2)) for s in subjects]
    results = []
    for i, subject in enumerate(subjects):
        bar = _share(progress, subject.name, sum(calls[:i]) / sum(calls), calls[i] / sum(calls) / n)
        results.append(evaluate(subject, prompts, metric, seed=seed, batch_size=batch_size, repeats=repeats, progress=bar))
    return [
        *results,
        scored(metric, held_out, prompts, model="real (held-out)"),
    ]


def _share(progress: Progress | None, label: str, done: float, per_image: float) -> Callable[[int], None] | None:
    """Turn counts of one row's images into the share of all rows."""
    if progress is None:
        return None

    def report(images: int) -> None:
        nonlocal done
        done += images * per_image
        progress(min(done, 1.0), label)

    return report
