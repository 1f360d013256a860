"""SANA-Sprint."""

from fastdiff.trainers import SanaSprint
from fastdiff.trainers.method import Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "told": SanaSprint(**_FEW, guidance_choices=(2.0, 3.0), guidance_scale=2.5, tangent_warmup=0, adaptation_steps=1, steps=4),
    "plain": SanaSprint(**_FEW, guidance_choices=(), guidance_scale=2.0, gan="softplus", r1_weight=0.1, steps=1, misaligned=False),
}
