import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from fastdiff.data.fashion import save_tokenizer, tokenizer, vocabulary
from fastdiff.eval.inception import Inception
from fastdiff.eval.preprocess import Preprocess

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipeline(*, seed: int, scheduler, **unet_options) -> StableDiffusionPipeline:
    """A stock text-to-image pipeline of 32x32 images with random weights."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    ids = {
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        **ids,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **unet_options,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokens,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def teacher() -> StableDiffusionPipeline:
    """Guided by its call, any number of steps."""
    return pipeline(seed=0, scheduler=DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"))


@pytest.fixture(scope="session")
def student() -> StableDiffusionPipeline:
    """One step without guidance by a bare call: a guidance embedding, and a schedule with one value left."""
    options = {
        "num_train_timesteps": 50_000,
        "beta_start": 0.005,
        "beta_end": 0.005,
        "beta_schedule": "linear",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "solver_order": 1,
        "final_sigmas_type": "zero",
    }
    noise_levels = DPMSolverMultistepScheduler(**options).lambda_t
    scheduler = DPMSolverMultistepScheduler(**options, lambda_min_clipped=noise_levels[999:1001].mean().item())
    return pipeline(seed=1, scheduler=scheduler, time_cond_proj_dim=4)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip model with random weights, as a folder that open_clip loads by itself."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": len(vocabulary()[0]), "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**json.loads(json.dumps(config)))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    text |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "lower"}}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    whole = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def inception_network() -> Inception:
    """Random weights with the batch statistics of images like those of the tests: activations neither die nor explode."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()((Preprocess("tf1")(torch.rand(4, 3, 40, 56), (299, 299)) - 128) / 128)
    nn.init.normal_(network.fc.bias)
    return network.eval()


@pytest.fixture(scope="session")
def inception_weights(inception_network: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the key layout of pytorch-fid and torch-fidelity, which store no count of batches."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({k: v for k, v in inception_network.state_dict().items() if "num_batches" not in k}, path)
    return path
