"""Distil a teacher by trajectory consistency (TCD) and draw with several numbers of steps and shares of fresh noise.

python trainers/tcd.py --output runs/tcd --max-steps 1000 --guidance 3 --eta 0.3
"""

from pathlib import Path

import torch
import tyro

from fastdiff import Teacher, Trainer
from fastdiff.data.images import save_grid
from fastdiff.trainers import TCD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/tcd"),
    max_steps: int = 1000,
    guidance: float = 3.0,
    eta: float = 0.3,
    steps: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = TCD(guidance_range=(guidance, guidance), eta=eta, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    captions = trainer.prompts.prompts[:8]
    for k in (2, 4, 8):  # the same student; both numbers have to be named in the call
        draws = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        images = pipeline(captions, num_inference_steps=k, eta=eta, generator=draws, output_type="pt").images
        save_grid(images, output / f"steps-{k}.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
