"""What a negative prompt takes away from a one-step student of the bundled world, and what it leaves.

The bundled captions name everything, so one word is left out: a full stop in its place (a token that no caption has), or nothing.
The negative prompt names what the student drew there unasked (``seen``) or something else (``other``, the control), as a word or
as the whole caption with that word. Image i has the same noise everywhere. Columns: ``seen``, the share of images that show what
was drawn unasked, 1 without steering; ``negated``, that show what the negative prompt names; ``kept``, whose two named attributes
are right.

python eval/negative_prompts.py runs/student --left-out stop --output docs/results/negative_prompts.csv
"""

import csv
from pathlib import Path
from typing import Any, Literal

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
SETTINGS = [("nasa", 0.1), ("nasa", 0.2), ("nasa", 0.5), ("nasa", 1.0), ("nag", 5.0)]
NEGATIVES = [("seen", "word"), ("seen", "caption"), ("other", "word"), ("other", "caption")]


def caption(asked: Attributes, column: int, word: str) -> str:
    """The caption with ``word`` for its garment (0), foreground (1) or background (2); an empty one leaves no gap."""
    words = [GARMENTS[asked.garment], *(tuple(COLOURS)[k] for k in (asked.foreground, asked.background))]
    words[column] = word
    return " ".join(TEMPLATE.format(garment=words[0], foreground=words[1], background=words[2]).split())


def main(
    folder: tyro.conf.Positional[Path],
    output: Path,
    left_out: Literal["stop", "nothing"] = "stop",
    n: int = 336,
    seed: int = 0,
    batch_size: int = 336,
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    classifier, asked = FashionClassifier.load(), [parse(text) for text in random_captions(n, seed)]
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

    rows: list[dict[str, Any]] = []
    for column, (attribute, names) in enumerate(NAMES.items()):
        prompts = [caption(a, column, "." if left_out == "stop" else "") for a in asked]
        unsteered = found(prompts, prompts, "nasa", 0.0)
        seen, named = unsteered[0][:, column], [k for k in range(3) if k != column]
        step = torch.randint(1, len(names), (n,), generator=torch.Generator().manual_seed(seed))
        for negative, wording in NEGATIVES:
            target = seen if negative == "seen" else (seen + step) % len(names)
            words = [names[k] for k in target.tolist()]
            away = words if wording == "word" else [caption(a, column, word) for a, word in zip(asked, words, strict=True)]
            for rule, scale in [("nasa", 0.0), *SETTINGS]:
                after, calls = unsteered if scale == 0 else found(prompts, away, rule, scale)
                shares = {"seen": after[:, column] == seen, "negated": after[:, column] == target}
                shares["kept"] = (after == wanted)[:, named].all(dim=1)
                row = {"attribute": attribute, "negative": negative, "wording": wording, "rule": rule, "scale": scale, "n": n}
                row["calls"] = calls
                for name, score in ((name, Score.of(share)) for name, share in shares.items()):
                    row |= {name: f"{score.value:.4f}", f"{name}_se": f"{score.se:.4f}"}
                rows.append(row)
                print(*row.values(), flush=True)
    with aside(output) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
