"""Untrained components of the bundled teacher's shape, small enough to build in every test: no files, no network, no mocks."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, Gemma2Config, Gemma2Model

from fastdiff.data.fashion import gemma_tokenizer, tokenizer
from fastdiff.models.teacher import Teacher

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_unet() -> UNet2DConditionModel:
    """0.25 M parameters on 8x8x4 latents and 16 text states of width 32; the bottleneck is 4x4 of width 32."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of 32x32 images with random weights; the global generator is left as it was."""
    tokens = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
        blocks = 3
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        )
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokens,
            unet=tiny_unet(),
            scheduler=DDIMScheduler(
                **BETAS,
                prediction_type=prediction_type,
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                timestep_spacing="trailing",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_teacher(seed: int = 0, prediction_type: str = "epsilon") -> Teacher:
    """``tiny_pipeline`` as a teacher, named like the bundled one so that it has the fashion captions as its prompts."""
    return Teacher(tiny_pipeline(seed, prediction_type), name="fashion")


def tiny_sana(seed: int = 0, shift: float = 1.0) -> SanaPipeline:
    """A SanaPipeline of 32x32 images with random weights, 0.05 M in its transformer: 4x4 tokens of width 32, four blocks."""
    tokens, blocks = gemma_tokenizer(), (8, 16, 16)
    text = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    sides = {"block_types": "ResBlock", "block_out_channels": blocks, "layers_per_block": (1, 1, 1), "qkv_multiscales": ((),) * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            tokenizer=tokens,
            text_encoder=Gemma2Model(text),
            vae=AutoencoderDC(
                latent_channels=4,
                attention_head_dim=8,
                scaling_factor=0.8,
                **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()},
            ),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                sample_size=8,
                patch_size=2,
                num_layers=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=32,
                qk_norm="rms_norm_across_heads",
                interpolation_scale=1,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flow_teacher(seed: int = 0, shift: float = 1.0) -> Teacher:
    """``tiny_sana`` as a teacher, named like the bundled one."""
    return Teacher(tiny_sana(seed, shift), name="fashion-flow")
