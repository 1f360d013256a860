"""Generate the images of a model into a folder, on one device or many; run it again to go on after an interruption.

python eval/generate.py fashion --output runs/images --n 200 --steps 10 --guidance-scale 3
torchrun --nproc-per-node 4 -- eval/generate.py runs/student --output runs/images --prompts prompts.txt
"""

from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from tqdm import tqdm

from fastdiff.data.fashion import random_captions
from fastdiff.data.prompts import read_prompts
from fastdiff.eval.generate import generate
from fastdiff.eval.generation import Generation
from fastdiff.eval.sources import open_source


def main(
    source: tyro.conf.Positional[str],
    output: Path,
    prompts: Path | None = None,
    n: int | None = None,
    lora: Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())  # else several processes on a CPU do not see each other
    with state.local_main_process_first():  # one download a machine
        subject = open_source(source, lora=lora, steps=steps, guidance_scale=guidance_scale, device=state.device)
    lines = random_captions(n or 200, seed) if prompts is None else read_prompts(prompts, None)[:n]  # type: ignore[arg-type]
    share = -(-len(lines) // state.num_processes)
    with tqdm(total=share, unit="image", disable=not state.is_main_process) as bar:
        ranks = {"rank": state.process_index, "world_size": state.num_processes}
        generate(subject, lines, output, seed=seed, batch_size=batch_size, progress=bar.update, **ranks)
    state.wait_for_everyone()
    if state.is_main_process:
        made = Generation.open(output)
        print(f"{made.settings['n']} images of {made.model} in {output}, {made.nfe} network calls each")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
