"""Negative prompts without guidance, in one network call: NASA and NAG as attention processors of stock diffusers networks.

A one-step student has no unconditional pass that a negative prompt could replace. What both methods subtract instead is an
attention output: with the same image queries Q and the layer's own projections of the two texts,

    Z+ = softmax(Q K+^T / sqrt(d)) V+,   Z- = softmax(Q K-^T / sqrt(d)) V-
    NASA:  Z = Z+ - alpha Z-                                                  SNOOPI (ICCV 2025, arXiv 2412.02687)
    NAG:   Zt = g Z+ - (g - 1) Z-,  cut to ||Zt|| <= tau ||Z+|| per token,  Z = a Zt + (1 - a) Z+      (arXiv 2505.21179)

with heads merged and before ``to_out``, in every layer where the image reads text: ``attn2`` of UNet, PixArt and SANA, the image
queries of SD3's joint attention. NAG's norm is L2 over channels, as in its public code for Flux; its paper has L1 (recalled).

The negative text travels behind the positive one in ``encoder_hidden_states``, [B, L+ + L-, C], and its mask behind the other
mask. So it passes what the network does to text (projection, norm, SD3's text stream), each row keeps its own negative through
batching and devices, and a processor holds no tensors, only the length L+ at which it cuts.

The file needs torch and diffusers alone. An exported folder holds a copy of it:

>>> pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=f"{folder}/negative_prompt.py", trust_remote_code=True)
>>> pipeline("a boot on a white background", negative_prompt="red", nasa_scale=0.2).images[0]
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Rule = Callable[[Tensor, Tensor], Tensor]
SCALES = {"nasa": 0.1, "nag": 5.0}  # the papers' for SD 1.5 and for few-step networks
_OFF = {"nasa": 0.0, "nag": 1.0}


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z+ - alpha Z- of attention outputs [..., C]; equal texts give (1 - alpha) Z+, so a large alpha turns images grey."""
    return positive - scale * negative


def nag(positive: Tensor, negative: Tensor, scale: float, *, tau: float = 2.5, alpha: float = 0.25) -> Tensor:
    """Z+ + a (Zt - Z+) of attention outputs [..., C]; its norm is at most (tau a + 1 - a) ||Z+|| for every ``scale`` >= 1."""
    further = positive + (scale - 1) * (positive - negative)
    wide = torch.promote_types(positive.dtype, torch.float32)
    allowed = tau * torch.linalg.vector_norm(positive, dim=-1, keepdim=True, dtype=wide)
    norm = torch.linalg.vector_norm(further, dim=-1, keepdim=True, dtype=wide)
    cut = torch.where(norm > allowed, allowed / norm, 1).to(positive.dtype)
    return positive + alpha * (further * cut - positive)


def steering(rule: str = "nasa", scale: float | None = None) -> Rule | None:
    """The rule called ``rule`` at ``scale`` (None is ``SCALES``); None where it changes nothing, at NASA's 0 and NAG's 1.

    Raises:
        ValueError: no such rule, or a scale on the wrong side of off, which would steer towards the negative prompt.
    """
    if rule not in SCALES:
        raise ValueError(f"negative rule {rule!r} is not known: expected one of {', '.join(SCALES)}.")
    value = SCALES[rule] if scale is None else scale
    if not math.isfinite(value) or value < _OFF[rule]:
        raise ValueError(
            f"{rule} scale is {value}: it is off at {_OFF[rule]:g} and must not be below, or the negative prompt pulls."
        )
    return None if value == _OFF[rule] else partial({"nasa": nasa, "nag": nag}[rule], scale=value)


class _Steered:
    def __init__(self, rule: Rule, positive_tokens: int) -> None:
        self.rule, self.positive_tokens = rule, positive_tokens

    def split(self, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """The two texts of [B, L+ + L-, C]; ``ValueError`` where nothing stands behind the positive one."""
        if text is None or text.shape[1] <= self.positive_tokens:
            raise ValueError(
                f"text states {None if text is None else tuple(text.shape)} have no negative prompt behind {self.positive_tokens} "
                "positive tokens: pass torch.cat([positive, negative], dim=1), or leave `negative_attention`."
            )
        return text[:, : self.positive_tokens], text[:, self.positive_tokens :]


class CrossAttention(_Steered):
    """The counterpart of ``AttnProcessor2_0`` in layers where images attend to text: SD's UNet and PixArt."""

    norm_after_heads = True

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        texts = self.split(encoder_hidden_states)
        masks = (None, None) if attention_mask is None else attention_mask.tensor_split((self.positive_tokens,), dim=-1)
        query = self._heads(attn, attn.to_q(hidden_states), attn.norm_q)
        found = (self._attend(attn, query, text, mask) for text, mask in zip(texts, masks, strict=True))
        out = attn.to_out[1](attn.to_out[0](self.rule(*found)))
        return out / attn.rescale_output_factor

    def _attend(self, attn: Any, query: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Heads merged, [B, N, C]."""
        if self.norm_after_heads and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        if mask is not None:
            rows, length, _ = text.shape
            mask = attn.prepare_attention_mask(mask, length, rows).view(rows, attn.heads, -1, length)
        key, value = self._heads(attn, attn.to_k(text), attn.norm_k), self._heads(attn, attn.to_v(text), None)
        return _merged(scaled_dot_product_attention(query, key, value, attn_mask=mask), query)

    def _heads(self, attn: Any, x: Tensor, norm: Any) -> Tensor:
        """[B, L, C] to [B, h, L, C / h], normed before or after."""
        if norm is not None and not self.norm_after_heads:
            x = norm(x)
        x = _split_heads(attn, x)
        return norm(x) if norm is not None and self.norm_after_heads else x


class SanaCrossAttention(CrossAttention):
    """The counterpart of ``SanaAttnProcessor2_0``, which norms queries and keys across heads."""

    norm_after_heads = False


class JointAttention(_Steered):
    """The counterpart of ``JointAttnProcessor2_0`` (SD3): image queries run against image + positive and image + negative keys.

    Positive text reads image and positive text, as ever; negative text reads image and negative text, so that it goes through
    the blocks beside the other in the same call. The rule acts on image tokens alone.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        image = self._projected(attn, hidden_states, "to_q", "to_k", "to_v", attn.norm_q, attn.norm_k)
        images, texts = [], []
        for text in self.split(encoder_hidden_states):
            words = self._projected(attn, text, "add_q_proj", "add_k_proj", "add_v_proj", attn.norm_added_q, attn.norm_added_k)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, words, strict=True))
            out = _merged(scaled_dot_product_attention(query, key, value), query)
            images.append(out[:, : hidden_states.shape[1]])
            after = out[:, hidden_states.shape[1] :]
            texts.append(after if attn.context_pre_only else attn.to_add_out(after))
        return attn.to_out[1](attn.to_out[0](self.rule(*images))), torch.cat(texts, dim=1)

    @staticmethod
    def _projected(attn: Any, x: Tensor, q: str, k: str, v: str, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (_split_heads(attn, getattr(attn, name)(x)) for name in (q, k, v))
        return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _split_heads(attn: Any, x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)


def _merged(x: Tensor, query: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).to(query.dtype)


_LAYERS = {
    "UNet2DConditionModel": ("attn2", "AttnProcessor2_0", CrossAttention),
    "PixArtTransformer2DModel": ("attn2", "AttnProcessor2_0", CrossAttention),
    "SanaTransformer2DModel": ("attn2", "SanaAttnProcessor2_0", SanaCrossAttention),
    "SD3Transformer2DModel": ("attn", "JointAttnProcessor2_0", JointAttention),
}


def steered_processors(network: Any, rule: Rule, positive_tokens: int) -> dict[str, Any]:
    """All attention processors of ``network`` for its ``set_attn_processor``, exchanged where the image reads text.

    Raises:
        ValueError: a network of another class, or one whose processors are not the stock ones: replaced, they would be lost.
    """
    if type(network).__name__ not in _LAYERS:
        raise ValueError(f"negative prompts work in {', '.join(_LAYERS)}, not in a {type(network).__name__}.")
    layer, stock, steered = _LAYERS[type(network).__name__]
    found = dict(network.attn_processors)
    for name in [name for name in found if name.endswith(f".{layer}.processor")]:
        if type(found[name]).__name__ != stock:
            raise ValueError(
                f"{name} is a {type(found[name]).__name__}, not {stock}: exchanged, its effect (such as an adapter's) is lost."
            )
        found[name] = steered(rule, positive_tokens)
    return found


@contextmanager
def negative_attention(network: Any, rule: Rule, positive_tokens: int, mask: Tensor | None = None) -> Iterator[None]:
    """Inside, ``network`` takes text states [B, L+ + L-, C] and steers away from the second part; afterwards it is as before.

    Args:
        positive_tokens: L+.
        mask: [R, L+ + L-], 1 where a token counts, for a pipeline that passes none (SD); each row serves B / R rows.
    """

    def masked(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert mask is not None
        rows = mask.repeat_interleave(len(args[0]) // len(mask), dim=0)
        return args, {**kwargs, "encoder_attention_mask": rows}

    before = dict(network.attn_processors)
    network.set_attn_processor(steered_processors(network, rule, positive_tokens))
    hook = None if mask is None else network.register_forward_pre_hook(masked, with_kwargs=True)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        network.set_attn_processor(before)


@torch.no_grad()
def draw(
    pipeline: Any, prompt: str | list[str], negative_prompt: str | list[str], rule: Rule, *, stock: Any = None, **call: Any
) -> Any:
    """``pipeline(prompt, **call)``, steered away from the negative prompt: the stock call, with as many network calls.

    Args:
        pipeline: stock SD, PixArt, SANA or SD3 pipeline of a student that runs without classifier-free guidance.
        negative_prompt: one for all prompts, or one a prompt.
        stock: the pipeline class's own call, for a subclass that replaces it.

    Raises:
        ValueError: guidance would run, the numbers of prompts differ, or the network cannot be steered.
    """
    stock = stock or pipeline.__call__
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    options = {name: p.default for name, p in inspect.signature(stock).parameters.items()} | call
    _check_guidance(network, options["guidance_scale"])
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: pass one, or one for each.")
    of_negative = {f"prompt_{i}": call.pop(f"negative_prompt_{i}", None) for i in (2, 3)} | {"complex_human_instruction": None}
    positive, negative = _encode(pipeline, prompts, options), _encode(pipeline, negatives, options | of_negative)
    length = positive["prompt_embeds"].shape[1]
    rows = {name: torch.cat([positive[name], negative[name]], dim=1) for name in positive if name != "pooled_prompt_embeds"}
    rows |= {name: positive[name] for name in positive if name not in rows}
    images = call.pop("num_images_per_prompt", 1)  # repeated here: SANA's own call orders masks unlike the states
    call |= {name: tensor.repeat_interleave(images, dim=0) for name, tensor in rows.items()}
    unmasked = "prompt_attention_mask" not in rows and "encoder_attention_mask" in inspect.signature(network.forward).parameters
    mask = _padding_mask(pipeline, negatives, length, rows["prompt_embeds"]) if unmasked else None
    with negative_attention(network, rule, length, mask):
        return stock(**{name: value for name, value in call.items() if name not in ("prompt_2", "prompt_3")})


def _check_guidance(network: Any, guidance_scale: float) -> None:
    embedded = network.config.get("time_cond_proj_dim") is not None or network.config.get("guidance_embeds")
    if guidance_scale > 1 and not embedded:
        raise ValueError(
            f"guidance_scale is {guidance_scale}: classifier-free guidance calls the network on a second text, which has no "
            "negative part. Pass guidance_scale=1 for a few-step student; a teacher takes negative prompts by its guidance."
        )


def _encode(pipeline: Any, prompts: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    """What the pipeline makes of the texts, by the names of its call's arguments."""
    takes = inspect.signature(pipeline.encode_prompt).parameters
    own = {
        "prompt": prompts,
        "device": pipeline._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    copied = ("prompt_2", "prompt_3", "clip_skip", "clean_caption", "max_sequence_length", "complex_human_instruction")
    given = own | {name: options[name] for name in copied if name in options}
    found = pipeline.encode_prompt(**{name: value for name, value in given.items() if name in takes})
    named = {"prompt_embeds": found[0]}
    if "prompt_attention_mask" in takes:
        named["prompt_attention_mask"] = found[1]
    if "pooled_prompt_embeds" in takes:
        named["pooled_prompt_embeds"] = found[2]
    return named


def _padding_mask(pipeline: Any, negatives: list[str], length: int, states: Tensor) -> Tensor:
    """[B, L+ + L-] for a network whose own pipeline masks nothing: 0 at the padding of the negative prompts alone."""
    texts = pipeline.maybe_convert_prompt(negatives, pipeline.tokenizer)  # as encode_prompt does
    size = states.shape[1] - length
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=size, truncation=True, return_tensors="pt")
    return torch.cat([torch.ones(len(negatives), length), tokens.attention_mask], dim=1).to(states.device)


class NegativePromptPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose call takes a negative prompt without guidance; without one, or at scale off, the stock call."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        nasa_scale: float | None = None,
        nag_scale: float | None = None,
        **call: Any,
    ) -> Any:
        """Draw ``prompt`` away from ``negative_prompt``, by NASA at 0.1 unless a scale of one of the two rules is given.

        Raises:
            ValueError: both scales are given, or ``draw``'s reasons.
        """
        if nasa_scale is not None and nag_scale is not None:
            raise ValueError(f"nasa_scale {nasa_scale} and nag_scale {nag_scale} are two rules: pass one of them.")
        rule = steering("nasa", nasa_scale) if nag_scale is None else steering("nag", nag_scale)
        if rule is None or not negative_prompt:
            return super().__call__(prompt, negative_prompt=negative_prompt, **call)
        if prompt is None:
            raise ValueError("a negative prompt steers a prompt given as text: pass prompt, not prompt_embeds.")
        return draw(self, prompt, negative_prompt, rule, stock=super().__call__, **call)
