"""Score stored ODE pairs themselves: how good a student that repeats them exactly would be.

python eval/pairs.py runs/long/pairs-0.safetensors --n 2240
"""

from pathlib import Path

import tyro
from safetensors.torch import load_file

from fastdiff import Teacher
from fastdiff.data.fashion import captions
from fastdiff.eval.fashion import FashionMetrics


def main(pairs: tyro.conf.Positional[Path], n: int = 2240) -> None:
    stored, every = load_file(pairs), captions()
    images = Teacher.from_pretrained("fashion").decode(stored["x0"][:n])
    scores = FashionMetrics.load()(images, [every[i] for i in stored["prompt"][:n].tolist()])
    print({name: round(value, 4) for name, value in scores.values.items()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
