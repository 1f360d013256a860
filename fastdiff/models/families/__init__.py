"""One small adapter per diffusers family, chosen by the pipeline's class."""

from typing import Any

from fastdiff.errors import UserError
from fastdiff.models.families.base import Family
from fastdiff.models.families.flux import Flux
from fastdiff.models.families.ltx import LTX
from fastdiff.models.families.pixart import PixArt
from fastdiff.models.families.sana import Sana
from fastdiff.models.families.stable_diffusion import StableDiffusion
from fastdiff.models.families.stable_diffusion_3 import StableDiffusion3
from fastdiff.models.families.stable_diffusion_xl import StableDiffusionXL
from fastdiff.models.families.wan import Wan

FAMILIES: tuple[Any, ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt, Sana, Wan, LTX)


def family_of(pipeline: Any) -> Family:
    """The adapter of a diffusers pipeline.

    Raises:
        UserError: no adapter knows this pipeline class.
    """
    for family in FAMILIES:
        if type(pipeline).__name__ in family.pipelines:
            return family(pipeline)
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(
        f"no adapter for a {type(pipeline).__name__}: its network would be called with the wrong inputs. Known: {known}."
    )
