"""Train the bundled autoencoder: 32x32x3 garments to 8x8x4 latents and back (a stock AutoencoderKL).

python trainers/fashion_autoencoder.py --output runs/fashion-vae --minutes 11
python trainers/fashion_autoencoder.py --init runs/fashion-vae --output runs/fashion-vae-2 --minutes 12 --kl-weight 1e-4 --seed 1
"""

import time
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL

from fastdiff.data.fashion import Coloured


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def main(
    output: Path = Path("runs/fashion-vae"),
    init: Path | None = None,
    minutes: float = 11,
    batch_size: int = 32,
    lr: float = 2e-3,
    kl_weight: float = 5e-4,
    decoder_only: bool = False,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = Coloured("train")
    vae = AutoencoderKL.from_pretrained(init) if init else new_autoencoder()
    vae.train()
    for part in (vae.encoder, vae.quant_conv) if decoder_only else ():
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(step / 200, 1) * max(1 - progress, 0.0) ** 0.8
        images = 2 * data.batch(batch_size, generator)[0] - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        loss = error.square().mean() + 0.2 * error.abs().mean() + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(
                f"{step:6d} {progress:5.2f} rmse {error.square().mean().sqrt() / 2:.4f} latent std {posterior.mean.std():.3f}",
                flush=True,
            )
    if not decoder_only:
        with torch.no_grad():
            latents = torch.cat([vae.encode(2 * data.batch(500, generator)[0] - 1).latent_dist.sample() for _ in range(8)])
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(output)
    print(f"scaling factor {vae.config.scaling_factor}, saved in {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
