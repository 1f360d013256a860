"""Evaluate a student beside the bundled teacher and real photographs: table, picture, JSON and a page.

python eval/fashion.py runs/ode-pairs-fashion --output runs/evaluation
"""

import shlex
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from fastdiff.eval.fashion import FashionMetrics, fashion_rows
from fastdiff.eval.report import grid_png, html_report, rows_json, table
from fastdiff.models.teacher import load_pipeline


def main(
    student: tyro.conf.Positional[Path],
    output: Path = Path("runs/evaluation"),
    teacher: str = "fashion",
    n: int = 2000,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> None:
    metric = FashionMetrics.load()
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {desc}") as bar:

        def progress(share: float, label: str) -> None:
            bar.set_description_str(label, refresh=False)
            bar.update(100 * share - bar.n)

        pipelines = load_pipeline(student), load_pipeline(teacher)
        results = fashion_rows(*pipelines, n=n, seed=seed, guidance_scale=guidance_scale, metric=metric, progress=progress)
    print(table([r.row() for r in results]))
    rows_json(output / "result.json", results, seed=seed)
    grid_png(output / "grid.png", {r.model: r.images for r in results}, results[0].prompts)
    html_report(output / "report.html", results, command=f"python {shlex.join(sys.argv)}", facts=metric.clip.conventions)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
