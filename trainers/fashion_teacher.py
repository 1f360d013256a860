"""Train the bundled teacher: a stock StableDiffusionPipeline folder of 32x32 garments with captions.

The autoencoder (trainers/fashion_autoencoder.py) comes first. UNet and text encoder are trained together by denoising score
matching with min-SNR weights and 10 % empty captions, so that classifier-free guidance works.

python trainers/fashion_teacher.py --vae runs/fashion-vae-2 --output fastdiff/assets/fashion --minutes 46
"""

import time
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from transformers import CLIPTextConfig, CLIPTextModel

from fastdiff.data.fashion import Coloured, save_tokenizer, tokenizer


def new_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    tokens = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 88),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokens, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.inference_mode()
def encode(vae: AutoencoderKL, data: Coloured, rounds: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    latents, texts = [], []
    for _ in range(rounds):
        for index in torch.arange(len(data)).split(100):
            images, _, captions = data.pick(index, generator)
            latents.append(vae.encode(2 * images - 1).latent_dist.mean * vae.config.scaling_factor)
            texts += captions
    return torch.cat(latents).clone(), texts


def save(pipeline: StableDiffusionPipeline, ema: EMAModel, parameters: list[torch.nn.Parameter], output: Path) -> None:
    ema.store(parameters)
    ema.copy_to(parameters)
    pipeline.save_pretrained(output)
    save_tokenizer(output / "tokenizer")
    ema.restore(parameters)


def main(
    vae: Path = Path("runs/fashion-vae-2"),
    output: Path = Path("fastdiff/assets/fashion"),
    minutes: float = 46,
    batch_size: int = 64,
    lr: float = 1e-3,
    rounds: int = 2,
    save_every: int = 2000,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pipeline = new_pipeline(AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False))
    latents, texts = encode(pipeline.vae, Coloured("train"), rounds, generator)
    ids = pipeline.tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids
    print(f"{len(latents)} latents, std {latents.std():.3f}, {pipeline.unet.num_parameters() / 1e6:.2f} M parameters", flush=True)

    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
    start, step, running = time.time(), 0, 0.0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(step / 500, 1) * max(1 - progress, 0.0) ** 0.7
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        x0, noise = latents[index], torch.randn(batch_size, *latents.shape[1:], generator=generator)
        strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        t = (strata * 1000).long()
        index[torch.rand(batch_size, generator=generator) < 0.1] = len(latents)
        cond = pipeline.text_encoder(ids[index])[0]
        eps = pipeline.unet(pipeline.scheduler.add_noise(x0, noise, t), t, cond).sample
        snr = compute_snr(pipeline.scheduler, t)
        loss = ((eps - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        step, running = step + 1, running + loss.item()
        if step % 200 == 0:
            print(f"{step:6d} {progress:5.2f} loss {running / 200:.4f}", flush=True)
            running = 0.0
        if step % save_every == 0:
            save(pipeline, ema, parameters, output)
    save(pipeline, ema, parameters, output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
