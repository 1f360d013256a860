"""Sample a one-step student, or any diffusers text-to-image folder, with plain diffusers.

python pipelines/text_to_image.py runs/ode-pairs-fashion --prompt "a red boot on a white background" --num-images 16
"""

from pathlib import Path

import torch
import tyro
from diffusers import DiffusionPipeline

from fastdiff.data.images import save_grid


def main(
    folder: tyro.conf.Positional[Path],
    prompt: str = "a red boot on a white background",
    num_images: int = 16,
    seed: int = 0,
    output: Path = Path("grid.png"),
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    images = pipeline([prompt] * num_images, generator=torch.Generator().manual_seed(seed), output_type="pt").images
    save_grid(images, output)
    print(f"{num_images} images in {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
