"""Train the bundled flow teacher: a stock SanaPipeline folder of 32x32 garments with captions.

The autoencoder (trainers/fashion_flow_autoencoder.py) comes first. Transformer and text encoder are trained together by flow
matching, ``mean (v(x_t, t, c) - (eps - x0))^2`` with ``x_t = (1 - t) x0 + t eps`` and t uniform, and 10 % empty captions, so that
classifier-free guidance works. Captions are encoded by the pipeline's own ``encode_prompt`` under the instruction that its call
puts before them, and the empty one without it, as that call has its negative prompt.

python trainers/fashion_flow_teacher.py --vae runs/fashion-flow-vae --output fastdiff/assets/fashion-flow --minutes 50
"""

import inspect
import time
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from fastdiff.data.fashion import Coloured, gemma_tokenizer

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
TOKENS = 10  # start, the instruction's last token, seven words; states beyond them are masked in the pipeline's 300


def new_pipeline(vae: AutoencoderDC) -> SanaPipeline:
    tokens = gemma_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=512,
        sliding_window=512,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=tokens.bos_token_id,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        num_layers=5,
        num_attention_heads=7,
        attention_head_dim=16,
        num_cross_attention_heads=7,
        cross_attention_head_dim=16,
        cross_attention_dim=112,
        caption_channels=64,
        mlp_ratio=2.5,
        interpolation_scale=1,
        qk_norm="rms_norm_across_heads",
    )
    return SanaPipeline(
        tokenizer=tokens,
        text_encoder=Gemma2Model(text),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@torch.inference_mode()
def encode(vae: AutoencoderDC, data: Coloured, rounds: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    latents, texts = [], []
    for _ in range(rounds):
        for index in torch.arange(len(data)).split(100):
            images, _, captions = data.pick(index, generator)
            latents.append(vae.encode(2 * images - 1).latent * vae.config.scaling_factor)
            texts += captions
    return torch.cat(latents).clone(), texts


def conditions(pipeline: SanaPipeline, texts: list[str], empty: Tensor) -> tuple[Tensor, Tensor]:
    """Text states [B, L, D] and their mask [B, L], those of the empty prompt where ``empty`` [B] says so."""

    def states(texts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        found = pipeline.encode_prompt(texts, False, max_sequence_length=TOKENS, complex_human_instruction=instruction)
        return found[0], found[1]

    captions, null = states(texts, INSTRUCTION), states([""], None)
    return torch.where(empty[:, None, None], null[0], captions[0]), torch.where(empty[:, None], null[1], captions[1])


def save(pipeline: SanaPipeline, ema: EMAModel, parameters: list[torch.nn.Parameter], output: Path) -> None:
    ema.store(parameters)
    ema.copy_to(parameters)
    pipeline.save_pretrained(output)
    ema.restore(parameters)


def main(
    vae: Path = Path("runs/fashion-flow-vae"),
    output: Path = Path("fastdiff/assets/fashion-flow"),
    minutes: float = 50,
    batch_size: int = 32,
    lr: float = 1e-3,
    rounds: int = 2,
    save_every: int = 1000,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pipeline = new_pipeline(AutoencoderDC.from_pretrained(vae).eval().requires_grad_(False))
    latents, texts = encode(pipeline.vae, Coloured("train"), rounds, generator)
    print(
        f"{len(latents)} latents, std {latents.std():.3f}, {pipeline.transformer.num_parameters() / 1e6:.2f} M parameters",
        flush=True,
    )

    parameters = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
    start, step, running = time.time(), 0, 0.0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(step / 500, 1) * max(1 - progress, 0.0) ** 0.7
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        x0, noise = latents[index], torch.randn(batch_size, *latents.shape[1:], generator=generator)
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        empty = torch.rand(batch_size, generator=generator) < 0.1
        states, mask = conditions(pipeline, [texts[i] for i in index.tolist()], empty)
        s = t[:, None, None, None]
        velocity = pipeline.transformer((1 - s) * x0 + s * noise, states, 1000 * t, encoder_attention_mask=mask).sample
        loss = (velocity - (noise - x0)).square().mean()
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
