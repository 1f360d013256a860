"""SANA: what the adapter says is what the stock pipeline does, from the prompt to the picture."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tiny import tiny_flow_teacher, tiny_sana
from torch import Tensor

from fastdiff.data.fashion import captions, gemma_tokenizer
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.diffusion.solvers import euler_step, sample
from fastdiff.diffusion.times import flow_grid
from fastdiff.errors import UserError
from fastdiff.models.condition import concat, repeat, take
from fastdiff.models.discriminator import TokenHead, features_at
from fastdiff.models.teacher import BUNDLED, Teacher
from fastdiff.pipelines.few_step import own_call

PROMPTS = ["a red boot on a white background", "a t-shirt"]
SIZE = {"height": 32, "width": 32, "use_resolution_binning": False}  # what the call must say; the window is for speed
CALL = {**SIZE, "max_sequence_length": 32}


def noise(teacher: Teacher, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_process_and_prediction_are_those_of_the_scheduler() -> None:
    teacher = tiny_flow_teacher(shift=3.0)
    assert isinstance(teacher.process, RectifiedFlow)
    assert (teacher.prediction_type, teacher.process.shift, teacher.latent_shape) == ("flow_prediction", 3.0, (4, 8, 8))
    pipeline = tiny_sana()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    pipeline.scheduler = DPMSolverMultistepScheduler(**flow)  # what NVIDIA's own folders have
    process = Teacher(pipeline).process
    assert isinstance(process, RectifiedFlow)
    assert process.shift == 2.0
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="no rectified flow"):
        Teacher(pipeline)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_make_the_images_of_the_pipeline(shift: float, guidance_scale: float) -> None:
    """Text states and mask, null prompt, network, velocity, grid, scaling factor and decoder at once."""
    teacher = tiny_flow_teacher(shift=shift)
    z = noise(teacher)
    call: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "output_type": "pt", **SIZE}
    want = teacher.pipeline(PROMPTS, latents=z, **call).images
    cond, null = teacher.encode(PROMPTS), repeat(teacher.null, 2)

    def denoise(x: Tensor, t: Tensor) -> Any:
        return teacher.denoiser.guided(x, t, cond, null, guidance_scale)

    with torch.no_grad():
        got = teacher.decode(sample(denoise, z, flow_grid(6, shift), euler_step))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5
    assert (teacher.pipeline(["", ""], latents=z, **call).images - want).abs().max() > 1e-2  # the prompt is heard


def test_the_network_is_called_as_the_pipeline_calls_it() -> None:
    teacher = tiny_flow_teacher()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = teacher.family.backbone.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], kwargs["timestep"], output[0])), with_kwargs=True
    )
    teacher.pipeline(PROMPTS, latents=noise(teacher), num_inference_steps=3, guidance_scale=2.0, output_type="latent", **CALL)
    hook.remove()
    cond = concat(repeat(teacher.null, 2), teacher.encode(PROMPTS))
    assert torch.allclose(torch.stack([t for _, t, _ in seen]), torch.tensor([[1000.0], [500.5], [1.0]]).expand(3, 4), rtol=1e-6)
    for x, t, output in seen:
        with torch.no_grad():
            mine = teacher.denoiser.network(x, t.double(), cond)
        assert (mine - output).abs().max() < 1e-5


def test_encode_is_the_call_s_own_encoding_and_the_empty_prompt_its_negative_one() -> None:
    """The call puts an instruction before prompts, none before the negative prompt: a null with it would be another condition."""
    import inspect

    teacher = tiny_flow_teacher()
    instruction = inspect.signature(teacher.pipeline.__call__).parameters["complex_human_instruction"].default
    assert len(instruction) > 3
    want = teacher.pipeline.encode_prompt(PROMPTS, True, complex_human_instruction=instruction, max_sequence_length=32)
    cond = teacher.encode([*PROMPTS, ""])
    assert torch.equal(cond["states"][:2], want[0])
    assert torch.equal(cond["mask"][:2], want[1])
    assert torch.equal(cond["states"][2:], want[2][:1])
    assert torch.equal(cond["mask"][2:], want[3][:1])
    assert cond["mask"].sum(1).tolist() == [9, 4, 1]  # start, the instruction's end, and the words
    assert torch.equal(take(teacher.encode(["", "a t-shirt"]), slice(1, 2))["states"], want[0][1:])
    assert not teacher.encode(PROMPTS)["states"].requires_grad


def test_the_window_of_the_tokenizer_leaves_out_padding_alone() -> None:
    """States behind a caption are masked, 32 or 300 of them; a tokenizer without a window has the pipeline's own."""
    teacher = tiny_flow_teacher()
    short, x, t = teacher.encode(PROMPTS), noise(teacher), torch.tensor([0.3, 1.0])
    assert short["mask"].shape == (2, 32)
    teacher.pipeline.tokenizer.model_max_length = int(1e30)
    long = teacher.encode(PROMPTS)
    assert long["mask"].shape == (2, 300)
    assert own_call(teacher.pipeline) == SIZE
    heard = teacher.denoiser(x, t, short).x0
    assert (teacher.denoiser(x, t, long).x0 - heard).abs().max() < 1e-5
    unmasked = {"states": short["states"], "mask": torch.ones_like(short["mask"])}
    assert (teacher.denoiser(x, t, unmasked).x0 - heard).abs().max() > 1e-4


def test_the_bottleneck_s_head_reads_tokens_where_they_lie() -> None:
    teacher = tiny_flow_teacher()
    block = teacher.family.bottleneck(teacher.family.backbone)
    assert block is teacher.family.backbone.transformer_blocks[1]  # type: ignore[index]
    cond = teacher.encode(PROMPTS)
    features = features_at(block, lambda: teacher.denoiser(noise(teacher), torch.tensor([0.3, 0.9]), cond))
    assert features.shape == (2, 16, 32)
    head = teacher.family.head()
    assert head(features).shape == (2,)
    assert isinstance(head, TokenHead)
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 32, 4, 4)
    assert torch.equal(head(image.flatten(2).transpose(1, 2)), head.head(image))


def test_the_embedded_time_is_what_the_named_layer_puts_out() -> None:
    teacher = tiny_flow_teacher()
    net, cond = teacher.family.backbone, teacher.encode(PROMPTS)
    layer, width = teacher.family.time_embedding(net)
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    x, t = noise(teacher), torch.tensor([0.2, 0.7], dtype=torch.float64)
    before = teacher.denoiser(x, t, cond).x0
    handle.remove()
    assert found[0].shape == (2, width) == (2, 32)
    handle = layer.register_forward_hook(lambda module, args, output: output.flip(0))
    swapped = teacher.denoiser(x, t, cond).output("flow_prediction")
    handle.remove()
    assert torch.allclose(swapped, teacher.denoiser(x, t.flip(0), cond).output("flow_prediction"), atol=1e-6)
    assert (before - teacher.denoiser(x, t, cond).x0).abs().max() == 0


def test_each_word_is_one_token_and_so_is_whatever_stands_between_them() -> None:
    tokens = gemma_tokenizer()
    assert tokens.convert_ids_to_tokens(tokens.encode("a red t-shirt on a cyan background")) == [
        "<bos>", "a", "red", "t-shirt", "on", "a", "cyan", "background"
    ]  # fmt: skip
    assert tokens.encode("") == [tokens.bos_token_id]
    assert tokens.encode("striped velvet") == [tokens.bos_token_id, tokens.unk_token_id]
    assert len({tuple(tokens.encode(caption)) for caption in captions()}) == 560


def test_the_bundled_folder_loads_and_is_small() -> None:
    folder = BUNDLED["fashion-flow"]
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 12e6
    teacher = Teacher.from_pretrained("fashion-flow")
    assert type(teacher.pipeline).__name__ == "SanaPipeline"
    assert own_call(teacher.pipeline) == CALL
    assert teacher.pipeline.tokenizer.get_vocab() == gemma_tokenizer().get_vocab()
    assert teacher.encode(PROMPTS)["mask"].sum(1).tolist() == [9, 4]
