"""The laws methods are proved on, each as a teacher that answers in closed form.

    ring       8 equal Gaussians on a circle in the plane                              lost modes show in their masses
    gaussian   one correlated Gaussian in 16 dimensions, eigenvalues 1 : 30            everything about it is known
    classes    3 classes of 2 or 3 modes, masses 0.02 .. 0.48, unequal spreads         conditions, rare modes
    images     5 smooth modes of 1x8x8 images, trained through a small UNet2DModel     pictures

All run under Stable Diffusion's noise schedule. The students' starting network, as a pretrained teacher's weights would be, is
fitted to the law's own v-prediction for a few seconds; the teacher that methods ask is the law itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.diffusion.schedulers import process_from_scheduler
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPE = "v_prediction"


@dataclass(frozen=True)
class KnownLaw:
    """A law, the network that students of it start from, and how many samples it is judged by."""

    build: Callable[[NoiseProcess], GaussianMixture]
    network: Callable[[], nn.Module]
    samples: int
    fit_steps: int
    batch_size: int
    options: dict[str, Any]


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
_HIDDEN = {"bottleneck": ("hidden", 128)}
LAWS: dict[str, KnownLaw] = {
    "ring": KnownLaw(GaussianMixture.ring, lambda: TimeMLP(2), 8000, 1500, 512, _HIDDEN),
    "gaussian": KnownLaw(Gaussian.anisotropic, lambda: TimeMLP(16), 8000, 1500, 512, _HIDDEN),
    "classes": KnownLaw(GaussianMixture.classes, lambda: TimeMLP(2, classes=3), 8000, 2000, 512, _HIDDEN),
    "images": KnownLaw(GaussianMixture.images, _unet, 2000, 300, 128, {"call": _call_unet, "lora_targets": _CONVOLUTIONS}),
}


def process() -> NoiseProcess:
    """Stable Diffusion's."""
    return process_from_scheduler(SCHEDULE)[0]


def teacher(name: str, *, seed: int = 0) -> Teacher:
    """The law ``name`` as a teacher with a fitted starting network, new at every call."""
    known, law = LAWS[name], exact(name)
    network = known.network()
    network.load_state_dict(_fitted(name, seed))
    labels = [] if law.labels is None else [str(label) for label in sorted(set(law.labels.tolist()))]
    return Teacher.from_module(
        network, law.process, PREDICTION_TYPE, shape=law.shape, prompts=labels or [""], name=name, law=law, **known.options
    )


def exact(name: str) -> GaussianMixture:
    """The law itself."""
    return LAWS[name].build(process())


def draw_labels(law: GaussianMixture, n: int, generator: torch.Generator) -> Tensor:
    """Classes [n] as often as the law has them; -1 where it has none."""
    if law.labels is None:
        return torch.full((n,), -1)
    return law.labels[torch.multinomial(law.weights, n, replacement=True, generator=generator)]


@cache
def _fitted(name: str, seed: int) -> dict[str, Tensor]:
    """Weights of the starting network: least squares on the law's v, a tenth of the labels dropped."""
    known, law = LAWS[name], exact(name)
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
        t = torch.randint(0, int(law.process.t_max) + 1, (known.batch_size,), generator=generator)
        x_t = law.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        seen = labels.masked_fill(torch.rand(known.batch_size, generator=generator) < 0.1, -1)
        loss = (call(network, x_t, t, seen) - law(x_t, t, seen).output(PREDICTION_TYPE)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.state_dict()
