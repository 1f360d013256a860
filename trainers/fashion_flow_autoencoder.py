"""Train the autoencoder of the bundled flow teacher: 32x32x3 garments to 8x8x4 latents and back (a stock AutoencoderDC).

It has no posterior of its own: noise on the latents and a small pull to 0 keep neighbouring latents alike, as a fixed-variance
one would. The scale of the noise is what the pull is measured against, so the latents come out near unit variance.

python trainers/fashion_flow_autoencoder.py --output runs/fashion-flow-vae --minutes 13
"""

import time
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderDC

from fastdiff.data.fashion import Coloured


def new_autoencoder() -> AutoencoderDC:
    sides = {
        "block_types": "ResBlock",
        "block_out_channels": (16, 32, 64),
        "layers_per_block": (1, 1, 2),
        "qkv_multiscales": ((), (), ()),
    }
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=16,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()},
    )


def main(
    output: Path = Path("runs/fashion-flow-vae"),
    minutes: float = 13,
    batch_size: int = 32,
    lr: float = 2e-3,
    noise: float = 0.1,
    pull: float = 3e-4,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, vae = Coloured("train"), new_autoencoder().train()
    print(f"{vae.num_parameters() / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(step / 200, 1) * max(1 - progress, 0.0) ** 0.8
        images = 2 * data.batch(batch_size, generator)[0] - 1
        latents = vae.encode(images).latent
        error = vae.decode(latents + noise * torch.randn_like(latents)).sample - images
        loss = error.square().mean() + 0.2 * error.abs().mean() + pull * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            rmse = error.square().mean().sqrt() / 2
            print(f"{step:6d} {progress:5.2f} rmse {rmse:.4f} latent std {latents.std():.3f}", flush=True)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * data.batch(500, generator)[0] - 1).latent for _ in range(8)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(output)
    print(f"scaling factor {vae.config.scaling_factor}, mean {latents.mean():.3f}, saved in {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
