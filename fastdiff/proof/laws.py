"""The laws methods are proved on, each as a teacher that answers in closed form.

    ring       8 equal Gaussians on a circle in the plane                              lost modes show in their masses
    gaussian   one correlated Gaussian in 16 dimensions, eigenvalues 1 : 30            everything about it is known
    classes    3 classes of 2 or 3 modes, masses 0.02 .. 0.48, unequal spreads         conditions, rare modes
    images     5 smooth modes of 1x8x8 images, trained through a small UNet2DModel     pictures
    views      5 objects from 8 azimuths as 3x16x16 images, the azimuth as the class   a prior for scenes; no certificate

    ring-flow, ring-edm    the ring under rectified flow and under EDM
    ring-smooth, gaussian-smooth, ring-flow-smooth    with a starting network of slow time sines, for methods that differentiate
                                                      it in time: its derivative is fitted only as well as those are slow

All others run under Stable Diffusion's noise schedule. The students' starting network, as a pretrained teacher's weights would be,
is fitted to the law's own prediction for a few seconds; the teacher that methods ask is the law itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import input_scale
from fastdiff.diffusion.process import EDM, LEVELS, NoiseProcess, RectifiedFlow, expand
from fastdiff.diffusion.schedulers import process_from_scheduler
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.scenes.objects import reference_views
from fastdiff.models.teacher import Teacher

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def process() -> NoiseProcess:
    """Stable Diffusion's."""
    return process_from_scheduler(SCHEDULE)[0]


@dataclass(frozen=True)
class KnownLaw:
    """A law, the network that students of it start from, and how many samples it is judged by."""

    build: Callable[[NoiseProcess], GaussianMixture]
    network: Callable[[], nn.Module]
    samples: int
    fit_steps: int
    batch_size: int
    options: dict[str, Any] = field(default_factory=dict)
    process: Callable[[], NoiseProcess] = process
    prediction_type: str = "v_prediction"


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return network


def _call_unet(network: nn.Module, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    output: Tensor = network(x_t, t, return_dict=False)[0]
    return output


_CONVOLUTIONS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out")
_HIDDEN = {"bottleneck": ("hidden", 128), "blocks": [(f"hidden.{i}", 128) for i in (1, 3, 5)]}
LAWS: dict[str, KnownLaw] = {
    "ring": KnownLaw(GaussianMixture.ring, lambda: TimeMLP(2), 8000, 1500, 512, _HIDDEN),
    "gaussian": KnownLaw(Gaussian.anisotropic, lambda: TimeMLP(16), 8000, 1500, 512, _HIDDEN),
    "classes": KnownLaw(GaussianMixture.classes, lambda: TimeMLP(2, classes=3), 8000, 2000, 512, _HIDDEN),
    "images": KnownLaw(GaussianMixture.images, _unet, 2000, 300, 128, {"call": _call_unet, "lora_targets": _CONVOLUTIONS}),
    "ring-flow": KnownLaw(
        GaussianMixture.ring,
        lambda: TimeMLP(2, time_scale=1000.0),
        8000,
        1500,
        512,
        options=_HIDDEN,
        process=RectifiedFlow,
        prediction_type="flow_prediction",
    ),
    "ring-edm": KnownLaw(
        GaussianMixture.ring,
        lambda: TimeMLP(2, time_scale=2.0),
        8000,
        1500,
        512,
        process=lambda: EDM(sigma_data=1.4222),
        prediction_type="edm",
    ),
    "ring-smooth": KnownLaw(GaussianMixture.ring, lambda: TimeMLP(2, octaves=4), 8000, 1500, 512, _HIDDEN),
    "gaussian-smooth": KnownLaw(Gaussian.anisotropic, lambda: TimeMLP(16, octaves=4), 8000, 1500, 512, _HIDDEN),
    "ring-flow-smooth": KnownLaw(
        GaussianMixture.ring,
        lambda: TimeMLP(2, time_scale=1000.0, octaves=4),
        8000,
        1500,
        512,
        options=_HIDDEN,
        process=RectifiedFlow,
        prediction_type="flow_prediction",
    ),
}


VIEWS, _DEVIATION = 8, 0.1


def views_of_objects(schedule: NoiseProcess) -> GaussianMixture:
    """Pictures 3x16x16 of the objects of ``fastdiff.models.scenes.objects``: class k is the azimuth ``360 k / VIEWS`` degrees.

    Each object seen from there is a component of deviation 0.1; which object it is, the class does not say.
    """
    means = reference_views(VIEWS).flatten(0, 1).flatten(1)
    labels = torch.arange(VIEWS).repeat(len(means) // VIEWS)
    spread = torch.full((len(means),), _DEVIATION**2)
    return GaussianMixture(means, spread, torch.ones(len(means)), schedule, labels=labels, shape=(3, 16, 16))


def _view_unet() -> nn.Module:
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=VIEWS + 1,
    )
    return network


def _call_view_unet(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    output: Tensor = network(x_t, t, class_labels=labels + 1, return_dict=False)[0]
    return output


def _as_picture(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


PRIORS: dict[str, KnownLaw] = {
    "views": KnownLaw(
        views_of_objects,
        _view_unet,
        2000,
        500,
        32,
        {
            "call": _call_view_unet,
            "decode": _as_picture,
            "lora_targets": _CONVOLUTIONS,
            "time_embedding": ("time_embedding", 64),
        },
    )
}
"""Laws that particles are led by (``trainers/prolific_dreamer.py``); no method is certified on them."""


def teacher(name: str, *, seed: int = 0) -> Teacher:
    """The law ``name`` as a teacher with a fitted starting network, new at every call."""
    known, law = _known(name), exact(name)
    network = known.network()
    network.load_state_dict(_fitted(name, seed))
    labels = [] if law.labels is None else [str(label) for label in sorted(set(law.labels.tolist()))]
    return Teacher.from_module(
        network, law.process, known.prediction_type, shape=law.shape, prompts=labels or [""], name=name, law=law, **known.options
    )


def _known(name: str) -> KnownLaw:
    return LAWS[name] if name in LAWS else PRIORS[name]


def exact(name: str) -> GaussianMixture:
    """The law itself."""
    known = _known(name)
    return known.build(known.process())


def draw_labels(law: GaussianMixture, n: int, generator: torch.Generator) -> Tensor:
    """Classes [n] as often as the law has them; -1 where it has none."""
    if law.labels is None:
        return torch.full((n,), -1)
    return law.labels[torch.multinomial(law.weights, n, replacement=True, generator=generator)]


@cache
def _fitted(name: str, seed: int) -> dict[str, Tensor]:
    """Weights of the starting network: least squares on the law's output, a tenth of the labels dropped."""
    known, law = _known(name), exact(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = known.network()
    call = known.options.get("call", lambda module, *inputs: module(*inputs))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / known.fit_steps)
    for _ in range(known.fit_steps):
        labels = draw_labels(law, known.batch_size, generator)
        x0 = law.sample(known.batch_size, generator, labels).float()
        t = law.process.at_level(torch.randint(0, LEVELS, (known.batch_size,), generator=generator))
        x_t = law.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        seen = labels.masked_fill(torch.rand(known.batch_size, generator=generator) < 0.1, -1)
        scale = input_scale(law.process, t, known.prediction_type)
        output = call(network, x_t if scale is None else expand(scale, x_t) * x_t, law.process.network_time(t), seen)
        loss = (output - law(x_t, t, seen).output(known.prediction_type)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.state_dict()
