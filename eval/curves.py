"""Write the reference curves of methods: bands of their loss terms over seeds, in short runs on a law known in closed form.

python eval/curves.py --seeds 0 1 2
"""

from pathlib import Path

import tyro

import fastdiff.trainers
from fastdiff.proof.curves import curve, write


def main(folder: Path = Path("docs/results/curves"), seeds: tuple[int, ...] = (0, 1, 2), only: tuple[str, ...] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for method in (getattr(fastdiff.trainers, name) for name in fastdiff.trainers.__all__):
        if not only or method.name() in only:
            write(folder / f"{method.name()}.csv", [curve(method, seed=seed) for seed in seeds])
            print(f"{method.name()}: {folder / f'{method.name()}.csv'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
