"""Distil a teacher into a LoRA that makes it a few-step model, by latent consistency.

python trainers/lcm_lora.py --output runs/lcm-lora --max-steps 1000 --guidance-scale 3
"""

from pathlib import Path

import tyro
from diffusers import LCMScheduler

from fastdiff import Teacher, Trainer
from fastdiff.models.teacher import load_pipeline
from fastdiff.trainers import LCMLoRA


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/lcm-lora"),
    max_steps: int = 1000,
    guidance_scale: float = 7.5,
    steps: int = 4,
    rank: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = LCMLoRA(guidance_scale=guidance_scale, steps=steps, rank=rank, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    trainer.train()  # the merged pipeline is in the folder too
    base = load_pipeline(teacher)
    base.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
    base.scheduler = LCMScheduler.from_config(base.scheduler.config)
    prompt = trainer.prompts.prompts[0]
    base(prompt, num_inference_steps=steps, guidance_scale=1.0).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
