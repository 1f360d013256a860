"""Negative prompts: the rules' closed forms, who is touched in each network, masks, and the calls that pipelines make."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, pixart_pipeline, sana_pipeline, sd3_pipeline
from tiny import tiny_pipeline, tiny_teacher
from torch import Tensor

from fastdiff.pipelines.export import NEGATIVE, Schedule, export_pipeline
from fastdiff.pipelines.negative import SCALES, draw, nag, nasa, negative_attention, steered_processors, steering

L = 6  # tokens of the positive text
networks = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 16, generator=generator), 4 * torch.randn(3, 5, 16, generator=generator)


def texts(family: Family, negative_tokens: int = L) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, family.text_width, generator=generator) for n in (L, negative_tokens))  # type: ignore[return-value]


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def test_nasa_is_affine_in_its_scale_and_equal_texts_shrink_the_output() -> None:
    positive, negative = outputs()
    assert torch.equal(nasa(positive, negative, 0.0), positive)
    middle = (nasa(positive, negative, 0.2) + nasa(positive, negative, 0.6)) / 2
    assert torch.allclose(nasa(positive, negative, 0.4), middle, atol=1e-6)
    assert torch.allclose(nasa(positive, positive, 0.3), 0.7 * positive, atol=1e-6)


@pytest.mark.parametrize("scale", [1.5, 5.0, 1e4])
def test_nag_is_bounded_however_strong(scale: float) -> None:
    tau, alpha = 1.7, 0.4
    positive, negative = outputs()
    found = nag(positive, negative, scale, tau=tau, alpha=alpha)
    assert (norms(found) <= (tau * alpha + 1 - alpha) * norms(positive) * (1 + 1e-5)).all()
    assert (norms(nasa(positive, negative, scale)) > norms(found)).all()


def test_nag_cuts_only_what_is_too_long_and_is_off_at_one() -> None:
    positive, negative = outputs()
    assert torch.equal(nag(positive, negative, 1.0), positive)
    assert torch.equal(nag(positive, positive, 9.0), positive)
    zero = torch.zeros_like(positive)
    assert torch.allclose(nag(positive, zero, 2.0), 1.25 * positive)  # Zt = 2 Z+, within tau = 2.5
    assert torch.allclose(nag(positive, zero, 10.0), (0.75 + 0.25 * 2.5) * positive)  # Zt = 10 Z+, cut to 2.5 Z+
    assert torch.equal(nag(zero, zero, 5.0), zero)
    wide = nag(positive.double(), negative.double(), 5.0)
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.float(), nag(positive, negative, 5.0), atol=1e-6)


def test_a_rule_is_none_where_it_is_off_and_refuses_the_other_side() -> None:
    assert steering("nasa", 0.0) is None
    assert steering("nag", 1.0) is None
    positive, negative = outputs()
    for name, plain in (("nasa", nasa), ("nag", nag)):
        assert torch.equal(steering(name)(positive, negative), plain(positive, negative, SCALES[name]))
    for name, scale in (("nasa", -0.1), ("nag", 0.9), ("nasa", float("nan"))):
        with pytest.raises(ValueError, match="negative prompt pulls"):
            steering(name, scale)
    with pytest.raises(ValueError, match="expected one of nasa, nag"):
        steering("cfg")


@networks
def test_only_layers_that_read_text_are_exchanged_and_everything_comes_back(family: Family) -> None:
    network = family.network()
    before, parameters = dict(network.attn_processors), sum(p.numel() for p in network.parameters())
    with negative_attention(network, partial(nasa, scale=0.1), L):
        inside = network.attn_processors
        assert {name for name in before if inside[name] is not before[name]} == set(family.steered)
        assert sum(p.numel() for p in network.parameters()) == parameters
    assert all(network.attn_processors[name] is before[name] for name in before)


@networks
def test_at_scale_zero_the_negative_text_leaves_no_trace(family: Family) -> None:
    network, (positive, negative) = family.network(), texts(family)
    stock = family.call(network, positive)
    with negative_attention(network, partial(nasa, scale=0.0), L):
        steered = family.call(network, torch.cat([positive, negative], dim=1))
    with negative_attention(network, partial(nasa, scale=0.5), L):
        away = family.call(network, torch.cat([positive, negative], dim=1))
    assert torch.equal(steered, stock)
    assert (away - stock).abs().max() > 1e-3


@networks
def test_a_layer_is_affine_in_the_scale_before_its_projection_out(family: Family) -> None:
    layer, (image, positive, negative) = family.layer(), family.states(L)

    def image_part(text: Tensor, scale: float) -> Tensor:
        layer.set_processor(family.processor(partial(nasa, scale=scale), L))
        out = layer(image, encoder_hidden_states=text)
        return out[0] if isinstance(out, tuple) else out

    both, equal = torch.cat([positive, negative], dim=1), torch.cat([positive, positive], dim=1)
    with torch.no_grad():
        none, half, full = (image_part(both, scale) for scale in (0.0, 0.5, 1.0))
        assert torch.allclose(half, (none + full) / 2, atol=1e-6)
        bias = layer.to_out[0].bias  # subtracted after it, equal texts would leave (1 - alpha) of the bias too
        assert bias.abs().max() > 0.01
        assert torch.allclose(image_part(equal, 0.3) - bias, 0.7 * (none - bias), atol=1e-6)


def test_sd3_text_tokens_read_their_own_text_and_the_rule_never_acts_on_them() -> None:
    family = FAMILIES["sd3"]
    layer, (image, positive, negative) = family.layer(), family.states(L)
    stock = layer.processor
    with torch.no_grad():
        _, of_positive = layer(image, encoder_hidden_states=positive)
        _, of_negative = layer(image, encoder_hidden_states=negative)
        layer.set_processor(family.processor(partial(nasa, scale=0.7), L))
        _, of_both = layer(image, encoder_hidden_states=torch.cat([positive, negative], dim=1))
    assert type(stock).__name__ == "JointAttnProcessor2_0"
    assert torch.equal(of_both, torch.cat([of_positive, of_negative], dim=1))


@pytest.mark.parametrize("name", ["unet", "pixart", "sana"])
def test_padding_of_each_rows_negative_prompt_carries_no_weight(name: str) -> None:
    family = FAMILIES[name]
    network, (positive, negative) = family.network(), texts(family, 5)
    mask = torch.tensor([[1] * L + [1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]])
    padding = mask[:, L:, None] == 0

    def away(text: Tensor) -> Tensor:
        both, rule = torch.cat([positive, text], dim=1), partial(nasa, scale=0.5)
        if name == "unet":
            with negative_attention(network, rule, L, mask):
                return family.call(network, both)
        with negative_attention(network, rule, L):
            return family.call(network, both, encoder_attention_mask=mask)

    plain = away(negative)
    assert torch.equal(away(torch.where(padding, negative + 3, negative)), plain)
    content = negative.clone()
    content[1, 3] += 3  # padding in row 0 alone
    found = away(content)
    assert torch.equal(found[0], plain[0])
    assert (found[1] - plain[1]).abs().max() > 1e-4


def test_a_row_of_the_mask_serves_all_images_of_its_prompt() -> None:
    family = FAMILIES["unet"]
    network, (positive, negative) = family.network(), texts(family)
    both = torch.cat([positive, negative], dim=1)
    mask = torch.ones(2, 2 * L)
    mask[0, L + 2 :] = 0
    with negative_attention(network, partial(nasa, scale=0.5), L, mask[:1]):
        shared = family.call(network, both)
    with negative_attention(network, partial(nasa, scale=0.5), L, mask[[0, 0]]):
        assert torch.equal(family.call(network, both), shared)
    with negative_attention(network, partial(nasa, scale=0.5), L, mask):
        assert not torch.equal(family.call(network, both)[1], shared[1])


def test_what_would_be_lost_or_cut_in_the_wrong_place_is_refused() -> None:
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import AttnProcessor

    family = FAMILIES["unet"]
    network, (positive, _) = family.network(), texts(family)
    with pytest.raises(ValueError, match="no negative prompt behind 6"), negative_attention(network, partial(nasa, scale=0.1), L):
        family.call(network, positive)
    assert type(network.attn_processors[family.steered[0]]).__name__ == "AttnProcessor2_0"  # back after the error too
    network.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="not AttnProcessor2_0"):
        steered_processors(network, partial(nasa, scale=0.1), L)
    with pytest.raises(ValueError, match="not in a UNet2DModel"):
        steered_processors(
            UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)), nasa, L
        )


def noises(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (tiny_pipeline, {"height": 32, "width": 32}),
    "pixart": (pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12}),
    "sana": (
        sana_pipeline,
        {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12},
    ),
    "sd3": (sd3_pipeline, {"max_sequence_length": 12}),
}


@pytest.mark.parametrize(("make", "options"), CALLS.values(), ids=CALLS)
def test_a_stock_pipeline_makes_one_call_and_each_row_its_own_negative(make: Any, options: dict[str, Any]) -> None:
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **options}
    prompts, negatives, rule = ["a red boot", "blue bag"], ["red", "a white background"], partial(nasa, scale=0.5)
    stock = pipeline(prompts, num_images_per_prompt=2, generator=noises(4), **call).images
    assert len(calls) == 1
    found = draw(pipeline, prompts, negatives, rule, num_images_per_prompt=2, generator=noises(4), **call).images
    assert len(calls) == 2
    assert torch.equal(pipeline(prompts, num_images_per_prompt=2, generator=noises(4), **call).images, stock)
    assert (found - stock).flatten(1).abs().amax(dim=1).min() > 1e-4
    for i in range(4):
        alone = draw(pipeline, prompts[i // 2], negatives[i // 2], rule, generator=noises(4)[i], **call).images
        assert torch.allclose(found[i], alone[0], atol=1e-4)
    swapped = draw(pipeline, prompts, negatives[::-1], rule, num_images_per_prompt=2, generator=noises(4), **call).images
    assert (found - swapped).flatten(1).abs().amax(dim=1).min() > 1e-5


def test_guidance_and_a_wrong_number_of_negatives_are_refused() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="classifier-free guidance calls"):
        draw(pipeline, "a boot", "red", nasa)
    with pytest.raises(ValueError, match="2 negative prompts for 1 prompts"):
        draw(pipeline, "a boot", ["red", "blue"], nasa, guidance_scale=1.0)


_CHILD = """
import json, sys
sys.modules["fastdiff"] = None
import torch
from diffusers import DiffusionPipeline
folder, name = sys.argv[1:]
torch.set_num_threads(1)
def load(**options):
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
stock, own = load(), load(custom_pipeline=folder + "/" + name, trust_remote_code=True)
calls = []
own.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
def images(pipeline, **call):
    noise = torch.Generator().manual_seed(0)
    return pipeline(["a red boot", "a blue bag"], num_images_per_prompt=2, generator=noise, output_type="pt", **call).images
bare = images(stock)
off = [{}, {"negative_prompt": "red", "nasa_scale": 0}, {"negative_prompt": "red", "nag_scale": 1}, {"nasa_scale": 0.1}]
same = [torch.equal(images(own, **call), bare) for call in off]
away = [images(own, negative_prompt="red", **call) for call in ({}, {"nasa_scale": 0.1}, {"nag_scale": 5.0})]
print(json.dumps({"class": type(own).__name__, "calls": calls, "same": same, "default": torch.equal(away[0], away[1]),
                  "moved": [(image - bare).abs().max().item() for image in away]}))
"""


def test_the_exported_folder_brings_its_own_negative_prompts(tmp_path: Path) -> None:
    teacher, folder = tiny_teacher(), tmp_path / "student"
    schedule = Schedule([999], "ddim")
    export_pipeline(
        teacher, teacher.family.backbone, folder, schedule, note={"method": "test"}, prompt="a red boot on a white background"
    )
    command = [sys.executable, "-I", "-c", _CHILD, str(folder), NEGATIVE]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, env={"HF_HOME": str(tmp_path / "hf")}
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["class"] == "NegativePromptPipeline"
    assert report["calls"] == [4] * 7
    assert report["same"] == [True] * 4
    assert report["default"]
    assert min(report["moved"]) > 1e-3


def test_two_scales_and_a_missing_prompt_are_refused() -> None:
    from fastdiff.pipelines.negative import NegativePromptPipeline

    pipeline = NegativePromptPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="pass one of them"):
        pipeline("a boot", negative_prompt="red", nasa_scale=0.1, nag_scale=2.0)
    with pytest.raises(ValueError, match="pass prompt, not prompt_embeds"):
        pipeline(prompt_embeds=torch.zeros(1, 16, 32), negative_prompt="red")
