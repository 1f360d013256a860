"""Distil a teacher into one adapter for 1 to 8 steps (Hyper-SD) and draw with it on the teacher's own pipeline.

python trainers/hyper_sd.py --output runs/hyper-sd --stage-steps 250 --guidance-scale 3 --one-step-steps 250
"""

from pathlib import Path

import torch
import tyro
from diffusers import TCDScheduler

from fastdiff import Teacher, Trainer
from fastdiff.data.images import save_grid
from fastdiff.models.teacher import load_pipeline
from fastdiff.trainers import HyperSD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/hyper-sd"),
    stage_steps: int = 250,
    one_step_steps: int = 0,
    guidance_scale: float = 7.5,
    eta: float = 0.3,
    rank: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = HyperSD(
        stage_steps=stage_steps, one_step_steps=one_step_steps, guidance_scale=guidance_scale, eta=eta, rank=rank, lr=lr
    )
    needed = sum(stage.steps for stage in method.stages())
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=needed, seed=seed)
    trainer.train()  # the merged pipeline is in the folder too
    base = load_pipeline(teacher)
    base.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
    base.scheduler = TCDScheduler.from_config(base.scheduler.config)
    captions = trainer.prompts.prompts[:8]
    for k in (1, 2, 4, 8):
        draws = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        call = {"num_inference_steps": k, "eta": eta, "guidance_scale": 1.0}
        save_grid(base(captions, generator=draws, output_type="pt", **call).images, output / f"steps-{k}.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
