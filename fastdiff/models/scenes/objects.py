"""Five small objects as Gaussian scenes, to make pictures that a view-conditioned prior is built from; no files, no download."""

import math

import torch
from torch import Tensor

from fastdiff.models.scenes.camera import Camera
from fastdiff.models.scenes.gaussians import GaussianScenes

_WHITE, _RED, _ORANGE, _GREEN, _BLUE = (0.9, 0.9, 0.9), (0.8, -0.7, -0.7), (0.9, 0.2, -0.8), (-0.6, 0.5, -0.5), (-0.5, -0.2, 0.9)
_BROWN, _YELLOW, _BEIGE, _DARK = (0.1, -0.3, -0.6), (0.9, 0.8, -0.7), (0.7, 0.5, 0.2), -0.7

Part = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
OBJECTS: dict[str, list[Part]] = {  # centre, deviations and colour of every part; azimuth 0 looks at it from +x
    "snowman": [
        ((0, 0, -0.35), (0.26, 0.26, 0.24), _WHITE),
        ((0, 0, 0.2), (0.17, 0.17, 0.16), _WHITE),
        ((0.3, 0, 0.2), (0.12, 0.06, 0.06), _ORANGE),
        ((0, 0, 0.5), (0.16, 0.16, 0.08), _RED),
    ],
    "tree": [
        ((0, 0, -0.5), (0.08, 0.08, 0.2), _BROWN),
        ((0, 0, 0), (0.28, 0.28, 0.15), _GREEN),
        ((0, 0, 0.3), (0.18, 0.18, 0.18), _GREEN),
        ((0.2, 0.3, 0.05), (0.08, 0.08, 0.08), _RED),
    ],
    "mushroom": [
        ((0, 0, -0.3), (0.11, 0.11, 0.25), _BEIGE),
        ((0, 0, 0.15), (0.34, 0.34, 0.14), _RED),
        ((0.3, -0.15, 0.25), (0.08, 0.08, 0.08), _WHITE),
        ((-0.25, 0.25, 0.25), (0.08, 0.08, 0.08), _WHITE),
    ],
    "boat": [
        ((0, 0, -0.35), (0.14, 0.4, 0.1), _BLUE),
        ((0, 0.05, 0.1), (0.05, 0.2, 0.24), _WHITE),
        ((0, -0.25, 0.4), (0.05, 0.14, 0.06), _RED),
        ((0, -0.1, 0), (0.04, 0.04, 0.35), _BROWN),
    ],
    "duck": [
        ((-0.05, 0, -0.2), (0.32, 0.2, 0.18), _YELLOW),
        ((0.25, 0, 0.2), (0.15, 0.14, 0.15), _YELLOW),
        ((0.5, 0, 0.17), (0.1, 0.07, 0.04), _ORANGE),
        ((-0.4, 0, 0), (0.1, 0.08, 0.1), _YELLOW),
    ],
}


def reference_scenes(size: int = 16) -> GaussianScenes:
    """``OBJECTS`` as particles that show [3, size, size] in about [-1, 1], on a dark background."""
    parts = [object_parts for object_parts in OBJECTS.values()]
    scenes = GaussianScenes(len(parts), (3, size, size), size=len(parts[0]))
    centres, scales, colour = (torch.tensor([[part[i] for part in one] for one in parts]) for i in range(3))
    values = {"centres": centres, "log_scales": scales.log(), "colour": colour}
    values["quaternions"] = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand_as(scenes.quaternions)
    values["log_density"] = torch.full_like(scenes.log_density, math.log(12.0))
    values["background"] = torch.full_like(scenes.background, _DARK)
    scenes.load_state_dict(values)
    return scenes.requires_grad_(False)


def reference_views(views: int, size: int = 16) -> Tensor:
    """What the objects show from ``views`` azimuths [objects, views, 3, size, size]."""
    scenes, ring = reference_scenes(size), Camera.turntable(views)
    rows = [scenes(torch.full((views,), k), ring) for k in range(scenes.n)]
    return torch.stack(rows)
