"""Merge two exported students of one teacher: share A + (1 - share) B, a folder that plain diffusers loads.

python trainers/merge_students.py runs/full runs/lora-clip --output runs/merged --share 0.5
"""

from pathlib import Path

import tyro

from fastdiff.pipelines.merge import merge_students


def main(first: tyro.conf.Positional[Path], second: tyro.conf.Positional[Path], output: Path, share: float = 0.5) -> None:
    merge_students(first, second, output, share)
    print(f"{output}: {share} of {first} and {1 - share} of {second}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
