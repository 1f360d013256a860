"""Draw what a composition benchmark asks for, into a folder that its own scorer reads; a second call goes on.

The prompts are the benchmark's own: GenEval's evaluation_metadata.jsonl, a *_val.txt of T2I-CompBench, DPG-Bench's folder
dpg_bench/prompts, VBench's VBench_full_info.json (for a text-to-video pipeline).

python eval/export_benchmark.py geneval evaluation_metadata.jsonl runs/student runs/geneval
"""

from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from fastdiff.eval.exporters import EXPORTERS, export
from fastdiff.eval.exporters.vbench import video_subject
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.models.teacher import load_pipeline


def main(
    benchmark: tyro.conf.Positional[Literal["geneval", "t2i-compbench", "dpg-bench", "vbench"]],
    prompts: tyro.conf.Positional[Path],
    pipeline: tyro.conf.Positional[str],
    output: tyro.conf.Positional[Path],
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    plan = EXPORTERS[benchmark](prompts)
    loaded = load_pipeline(pipeline).to(device)
    if plan.video:
        chosen = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        subject = video_subject(pipeline, loaded, **{name: value for name, value in chosen.items() if value is not None})
    else:
        subject = pipeline_subject(pipeline, loaded, steps=steps, guidance_scale=guidance_scale)
    with tqdm(total=len(plan.pieces), unit="file") as bar:
        drawn = export(plan, output, subject, seed=seed, batch_size=batch_size, progress=bar.update)
    print(f"{drawn} of {len(plan.pieces)} files drawn into {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
