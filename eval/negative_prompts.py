"""What a negative prompt takes away from a one-step student of the bundled world, and what it leaves.

The bundled captions name everything, so one word is replaced by a full stop, a token that no caption has: `a . boot on a white
background` draws boots of every colour. The negative prompt names what the student drew for it unasked (``seen``), as a word or
as the whole caption, or something else (``other``, the control). Image i has the same noise everywhere. ``present``: share of
images that show what the student drew unasked, 1 without steering; ``kept``: share whose two named attributes are right.

python eval/negative_prompts.py runs/student --output docs/results/negative_prompts.csv
"""

import csv
from pathlib import Path

import torch
import tyro
from diffusers import DiffusionPipeline
from torch import Tensor

from fastdiff.data.fashion import COLOURS, GARMENTS, TEMPLATE, Attributes, parse, random_captions
from fastdiff.eval.attributes import attributes
from fastdiff.eval.classifier import FashionClassifier
from fastdiff.eval.cost import count_calls
from fastdiff.eval.noise import generators
from fastdiff.eval.stats import Score
from fastdiff.files import aside
from fastdiff.pipelines.negative import draw, steering

NAMES = {"garment": GARMENTS, "foreground": tuple(COLOURS), "background": tuple(COLOURS)}
SETTINGS = [("nasa", scale) for scale in (0.0, 0.1, 0.2, 0.5, 1.0)] + [("nag", scale) for scale in (2.0, 5.0, 10.0)]


def left_out(asked: Attributes, column: int) -> str:
    """The caption with a full stop for its garment (0), foreground (1) or background (2)."""
    words = [GARMENTS[asked.garment], *(tuple(COLOURS)[k] for k in (asked.foreground, asked.background))]
    words[column] = "."
    return TEMPLATE.format(garment=words[0], foreground=words[1], background=words[2])


def main(folder: tyro.conf.Positional[Path], output: Path, n: int = 1120, seed: int = 0, batch_size: int = 280) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    classifier, asked = FashionClassifier.load(), [parse(caption) for caption in random_captions(n, seed)]
    wanted = torch.tensor([(a.garment, a.foreground, a.background) for a in asked])

    def found(prompts: list[str], negatives: list[str], rule: str, scale: float) -> tuple[Tensor, float]:
        """Attributes [n, 3] of the images and network calls an image."""
        steered, images = steering(rule, scale), []
        with count_calls(pipeline.unet) as calls:
            for ids in torch.arange(n).split(batch_size):
                i, call = ids.tolist(), {"generator": generators(seed, ids.tolist()), "output_type": "pt"}
                given, away = [prompts[k] for k in i], [negatives[k] for k in i]
                drawn = pipeline(given, **call) if steered is None else draw(pipeline, given, away, steered, **call)
                images.append(drawn.images)
        return torch.stack(attributes(torch.cat(images), classifier), dim=1), calls.samples / n

    rows = []
    for column, (attribute, names) in enumerate(NAMES.items()):
        prompts = [left_out(a, column) for a in asked]
        before, _ = found(prompts, prompts, "nasa", 0.0)
        seen, named = before[:, column], [k for k in range(3) if k != column]
        step = torch.randint(1, len(names), (n,), generator=torch.Generator().manual_seed(seed))
        other = (seen + step) % len(names)
        for negative, wording in [(negative, wording) for negative in ("seen", "other") for wording in ("word", "caption")]:
            away = [names[k] for k in (seen if negative == "seen" else other).tolist()]
            if wording == "caption":
                away = [prompt.replace(".", word) for prompt, word in zip(prompts, away, strict=True)]
            for rule, scale in SETTINGS:
                after, calls = found(prompts, away, rule, scale)
                present = Score.of(after[:, column] == seen)
                kept = Score.of((after == wanted)[:, named].all(dim=1))
                scores = {"present": present.value, "present_se": present.se, "kept": kept.value, "kept_se": kept.se}
                told = {
                    "attribute": attribute,
                    "negative": negative,
                    "wording": wording,
                    "rule": rule,
                    "scale": scale,
                    "n": n,
                    "calls": calls,
                }
                rows.append(told | {name: f"{value:.4f}" for name, value in scores.items()})
                print(*rows[-1].values(), flush=True)
    with aside(output) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
