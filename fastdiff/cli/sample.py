"""``fastdiff sample DIR --prompt "..."``: images of a saved pipeline, in one grid.

A student needs no further option: its folder knows its steps. A teacher takes its pipeline's own defaults unless told.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.loading import open_pipeline
from fastdiff.cli.options import parse
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 128  # smaller images are enlarged, pixel by pixel, to about this width


@dataclass(kw_only=True)
class Options:
    pipeline: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder written by fastdiff or diffusers, a hub id, or a bundled teacher, `fashion` or `fashion-flow`."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]
    """What to draw; several prompts become several rows."""
    num_images: int = 16
    """Images per prompt."""
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("grid.png")
    """The picture to write."""
    steps: int | None = None
    """Inference steps; not needed for a student."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 is off; not needed for a student."""
    negative_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What not to draw, for students that run without guidance; it costs no network call."""
    negative_rule: Literal["nasa", "nag"] = "nasa"
    """How attention steers away: nasa subtracts, nag extrapolates with a bound."""
    negative_scale: float | None = None
    """Strength; off at 0 (nasa) and 1 (nag); without it 0.1 and 5."""
    seed: int = 0
    """Seed of the noise; each image has its own, as in `fastdiff eval`."""
    batch_size: int = 16
    """Images per call; it does not change them."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def check(options: Options) -> None:
    """Refuse what would fail after the drawing."""
    from PIL import Image

    if not options.prompt or not all(prompt.strip() for prompt in options.prompt):
        raise UserError('--prompt is empty; say what to draw, such as --prompt "a red boot on a white background".')
    for name in ("num_images", "batch_size", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if options.negative_prompt is None and options.negative_scale is not None:
        raise UserError(f"--negative-scale is {options.negative_scale} and there is no --negative-prompt to steer away from.")
    if Image.registered_extensions().get(options.output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {options.output} does not end like an image file; use a name such as grid.png.")


def check_student(pipeline: str, steps: int | None, guidance_scale: float | None = None) -> None:
    """Refuse other steps, or another guidance, of a student than it was trained for."""
    note = Path(pipeline) / "fastdiff.json"
    if not note.is_file():
        return
    facts = json.loads(note.read_text(encoding="utf-8"))
    if guidance_scale is not None:
        _check_guidance(pipeline, guidance_scale, facts)
    trained, told = facts.get("num_inference_steps"), facts.get("call", {}).get("num_inference_steps")
    index = json.loads((Path(pipeline) / "model_index.json").read_text(encoding="utf-8"))
    any_number = index["_class_name"] == "LatentConsistencyModelPipeline" or index["scheduler"][1] == "TCDScheduler"
    if steps is None or any_number or steps == trained == 1 or steps == told:
        return
    what = "one step, and" if trained == 1 else f"{trained} steps, which its folder makes of a bare call, and"
    why = "nothing" if trained == 1 else "their number to one it was not trained for"
    if told is not None:  # the folder does not know, and takes whatever it is told
        what, why = f"{trained} step{'' if trained == 1 else 's'}, and", "its times to ones it was not trained for"
    raise UserError(f"{pipeline} is a student of {what} --steps {steps} would change {why}: leave --steps out.")


def _check_guidance(pipeline: str, scale: float, facts: dict[str, Any]) -> None:
    """A student that is told its scale was trained in a range; all others have their guidance in themselves."""
    told = facts.get("guidance_range")
    low, high = told or (1.0, 1.0)
    if not low <= scale <= high:
        what = f"at guidance {low:g} to {high:g}" if told else "for no guidance in its call: what its teacher had is its own"
        raise UserError(f"{pipeline} was trained {what}, and --guidance-scale {scale:g} is none of that: leave it out.")


def draw(pipeline: Any, options: Options) -> "Tensor":
    """The images [N, 3, H, W] of all prompts in order; image i's randomness depends on the seed and i alone."""
    import torch

    from fastdiff.eval.noise import generators
    from fastdiff.pipelines.few_step import own_call

    chosen = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    call = own_call(pipeline) | {name: value for name, value in chosen.items() if value is not None}
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    pipeline_call = _steered(pipeline, options)
    images = []
    for ids in torch.arange(len(prompts)).split(options.batch_size):
        noise = generators(options.seed, ids.tolist())
        images.append(pipeline_call([prompts[i] for i in ids], generator=noise, output_type="pt", **call).images)
    return torch.cat(images)


def _steered(pipeline: Any, options: Options) -> Callable[..., Any]:
    """The pipeline's call, or one that steers away from the negative prompt."""
    from fastdiff.pipelines.negative import draw, steering

    negative = options.negative_prompt
    if negative is None:
        return pipeline
    try:
        rule = steering(options.negative_rule, options.negative_scale)
    except ValueError as error:
        raise UserError(f"--negative-scale: {error}") from error

    def call(prompts: list[str], **chosen: Any) -> Any:
        if rule is None:
            return pipeline(prompts, **chosen)
        try:
            return draw(pipeline, prompts, negative, rule, **chosen)
        except ValueError as error:
            raise UserError(f"--negative-prompt: {error}") from error

    return call


def run(argv: Sequence[str]) -> int:
    """Draw the grid."""

    def options(general: Options) -> Options:
        return general

    chosen = parse(options, argv, command="sample", description="Draw images from a saved pipeline into a grid.")
    check(chosen)
    check_student(chosen.pipeline, chosen.steps, chosen.guidance_scale)
    from fastdiff.data.images import save_grid
    from fastdiff.files import aside

    images = draw(open_pipeline(chosen.pipeline, chosen.device), chosen)
    several = len(chosen.prompt) > 1
    columns = chosen.num_images if several else max(1, round(chosen.num_images**0.5))
    with aside(chosen.output) as part:
        save_grid(images, part, columns=columns, zoom=max(1, _SHOWN // images.shape[-1]))
    print(f"{len(images)} images in {chosen.output}")
    return 0
