"""Differentiable things to look at: ``scenes(index, camera) -> x`` [B, C, H, W] of particle ``index[b]`` under camera b.

    FreeImages       every particle is a sample itself, whatever the camera                    no geometry
    VoxelScenes      a density and colour grid, rays integrated by emission and absorption     pure torch
    GaussianScenes   K anisotropic Gaussians, projected and attenuated in closed form          pure torch

Scenes live in the cube [-1, 1]^3 and put out what a diffusion model denoises (pixels or latents), without bounds. Cameras are
orthographic; see ``camera``.
"""

from fastdiff.models.scenes.base import Scenes, load_scenes, save_scenes, turntable
from fastdiff.models.scenes.camera import Camera
from fastdiff.models.scenes.gaussians import GaussianScenes
from fastdiff.models.scenes.images import FreeImages
from fastdiff.models.scenes.voxels import VoxelScenes

__all__ = ["SCENES", "Camera", "FreeImages", "GaussianScenes", "Scenes", "VoxelScenes", "load_scenes", "save_scenes", "turntable"]

SCENES: dict[str, type[Scenes]] = {"images": FreeImages, "voxels": VoxelScenes, "gaussians": GaussianScenes}
"""The kinds of scenes by the names that methods and files use."""
