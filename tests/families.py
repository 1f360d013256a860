"""Tiny random networks and pipelines of diffusers' families; ``FAMILIES`` are those that take negative prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import tiny_pipeline, tiny_sana, tiny_unet
from torch import Tensor

from fastdiff.models.teacher import Teacher

_HEADS = {"attention_head_dim": 8, "num_attention_heads": 4, "num_layers": 2, "sample_size": 8}
_LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        **_HEADS, patch_size=2, in_channels=4, out_channels=8, cross_attention_dim=32, caption_channels=32, norm_num_groups=1
    )


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        **_HEADS,
        in_channels=8,
        out_channels=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
    )


def sd3() -> SD3Transformer2DModel:
    """As SD3.5: queries and keys normed, and a second attention of the image to itself in the first block."""
    return SD3Transformer2DModel(
        **_HEADS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """In eval mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


@dataclass(frozen=True)
class Family:
    """A network, the names of the processors that a negative prompt exchanges, and what its call takes besides text."""

    make: Callable[[], Any]
    steered: tuple[str, ...]
    options: dict[str, Any]
    text_width: int = 32
    channels: int = 4

    def network(self) -> Any:
        return seeded(self.make)

    @torch.no_grad()
    def call(self, network: Any, text: Tensor, **options: Any) -> Tensor:
        x = torch.randn(2, self.channels, 8, 8, generator=torch.Generator().manual_seed(2))
        return network(x, timestep=torch.tensor([999, 999]), encoder_hidden_states=text, **self.options, **options).sample

    def layer(self) -> Any:
        """The first attention that a negative prompt steers, with biases off zero."""
        attn = self.network().get_submodule(self.steered[0].removesuffix(".processor"))
        torch.nn.init.normal_(attn.to_out[0].bias, generator=torch.Generator().manual_seed(3))
        return attn

    def processor(self, rule: Any, positive_tokens: int) -> Any:
        from fastdiff.pipelines.negative import steered_processors

        return steered_processors(self.network(), rule, positive_tokens)[self.steered[0]]

    def states(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, positive and negative text states inside the network."""
        attn, generator = self.layer(), torch.Generator().manual_seed(4)
        width = attn.query_dim
        text = getattr(attn, "cross_attention_dim", None) or width
        return tuple(torch.randn(2, n, w, generator=generator) for n, w in ((9, width), (tokens, text), (tokens, text)))  # type: ignore[return-value]


_BLOCKS = ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0")
FAMILIES = {
    "unet": Family(tiny_unet, tuple(f"{block}.transformer_blocks.0.attn2.processor" for block in _BLOCKS), {}),
    "pixart": Family(
        pixart,
        tuple(f"transformer_blocks.{i}.attn2.processor" for i in range(2)),
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "sana": Family(sana, tuple(f"transformer_blocks.{i}.attn2.processor" for i in range(2)), {}, channels=8),
    "sd3": Family(
        sd3,
        tuple(f"transformer_blocks.{i}.attn.processor" for i in range(2)),
        {"pooled_projections": torch.linspace(-1, 1, 128).view(2, 64)},
    ),
}


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        **options,
    )


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64), seeded(lambda: T5EncoderModel(config))


def pixart_pipeline(kind: type[Any] = PixArtAlphaPipeline) -> Any:
    tokenizer, encoder = _t5()
    return kind(tokenizer=tokenizer, text_encoder=encoder, vae=seeded(_vae), transformer=seeded(pixart), scheduler=DDIMScheduler())


def pixart_sigma_pipeline() -> PixArtSigmaPipeline:
    return pixart_pipeline(PixArtSigmaPipeline)


def _clips() -> tuple[Any, Any, Any]:
    """A tokenizer and two text encoders with a pooled output of 32."""
    from transformers import CLIPTextModelWithProjection

    clip = tiny_pipeline()
    config = clip.text_encoder.config
    config.projection_dim = 32
    first, second = (seeded(lambda: CLIPTextModelWithProjection(config), seed) for seed in (0, 1))
    return clip.tokenizer, first, second


def sdxl_pipeline(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """Text states of both encoders side by side, 64 wide; micro-conditions of 8 values each."""
    tokenizer, _, second = _clips()
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(4, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            cross_attention_dim=64,
            norm_num_groups=8,
        )
    )
    return StableDiffusionXLPipeline(
        vae=seeded(_vae),
        text_encoder=tiny_pipeline().text_encoder.eval(),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"),
    )


def flux_pipeline(guidance_embeds: bool = True) -> FluxPipeline:
    """Packed latents of 4 channels; its own size is 8 latent positions a side."""
    tokenizer, encoder = _t5()
    clip = tiny_pipeline()
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=seeded(lambda: _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)),
        text_encoder=clip.text_encoder.eval(),
        tokenizer=clip.tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.default_sample_size = 8
    return pipeline


def sana_pipeline() -> SanaPipeline:
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *_LETTERS]
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]),
        text_encoder=seeded(lambda: Gemma2Model(config)),
        vae=vae,
        transformer=seeded(sana),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def sd3_pipeline() -> StableDiffusion3Pipeline:
    tokenizer, encoder = _t5()
    words, first, second = _clips()
    return StableDiffusion3Pipeline(
        transformer=seeded(sd3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=seeded(lambda: _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)),
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=words,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def wan_pipeline() -> Any:
    """For videos of 5 frames of 32x32: two latent frames of 16 channels, 4x4."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    tokenizer, _ = _t5()
    network = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32}
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_umt5(),
        transformer=seeded(lambda: WanTransformer3DModel(**network, ffn_dim=48, num_layers=2, rope_max_seq_len=32)),
        vae=seeded(lambda: AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def ltx_pipeline() -> Any:
    """For videos of 5 frames of 32x32: two latent frames of 8 channels, 8x8."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer, encoder = _t5()
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32}
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=seeded(lambda: LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_layers=2, **heads)),
        vae=seeded(
            lambda: AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 5,
                spatio_temporal_scaling=(True, True, False, False),
                decoder_spatio_temporal_scaling=(True, True, False, False),
                patch_size=1,
                patch_size_t=1,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    vocabulary = 4 + len(_LETTERS)
    config = UMT5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return seeded(lambda: UMT5EncoderModel(config))


SMALL = {"height": 32, "width": 32, "num_frames": 5}
TEACHERS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "sd": (tiny_pipeline, {}),
    "sdxl": (sdxl_pipeline, {}),
    "sdxl-v": (lambda: sdxl_pipeline("v_prediction"), {}),
    "sd3": (sd3_pipeline, {}),
    "flux": (flux_pipeline, {}),
    "flux-schnell": (lambda: flux_pipeline(guidance_embeds=False), {"height": 16, "width": 24}),
    "pixart": (pixart_pipeline, {}),
    "pixart-sigma": (pixart_sigma_pipeline, {}),
    "sana": (tiny_sana, {}),
    "wan": (wan_pipeline, SMALL),
    "ltx": (ltx_pipeline, SMALL),
}
"""Pipelines of all families, and the size of their samples where the network knows none."""
IMAGES = [name for name in TEACHERS if "num_frames" not in TEACHERS[name][1]]


def family_teacher(name: str) -> Teacher:
    make, size = TEACHERS[name]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    return Teacher(pipeline, name=name, size=size)
