"""Tiny random networks and pipelines of the families that take negative prompts: UNet, PixArt, SANA and SD3."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor

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


def pixart_pipeline() -> PixArtAlphaPipeline:
    tokenizer, encoder = _t5()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=seeded(_vae),
        transformer=seeded(pixart),
        scheduler=DDIMScheduler(),
    )


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
    from transformers import CLIPTextModelWithProjection

    tokenizer, encoder = _t5()
    clip = tiny_pipeline()
    config = clip.text_encoder.config
    config.projection_dim = 32
    return StableDiffusion3Pipeline(
        transformer=seeded(sd3),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=seeded(lambda: _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)),
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(config)),
        tokenizer=clip.tokenizer,
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(config), 1),
        tokenizer_2=clip.tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )
