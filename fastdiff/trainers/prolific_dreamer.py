"""ProlificDreamer: particles of a differentiable generator follow a diffusion prior by variational score distillation.

    x     = g(theta_i, c)                                                   particle i, drawn uniformly, seen by camera c
    G     = s_t^2 ( eps_real^guided(x_t, t, y_c) - eps_fake(x_t, t, c, y_c) )                 x_t = a_t x + s_t eps
    particle:    0.5 || x - sg[x - G] ||^2, t ~ U{20..980}, later U{20..500}    summed over a sample's elements, mean of the batch
    fake score:  || eps_fake(x_t', t', c, y_c) - eps' ||^2 on sg[x], t' ~ U{0..999}, fresh eps', the pose zeroed w.p. 0.1

Only the prior is guided. ``score="sds"`` puts the drawn eps in the place of eps_fake, which is DreamFusion's score distillation
sampling; it is the same code, so with eps_fake = eps the two agree to the bit. ``score="cloud"`` is the closed form: the score of
the empirical law of what the particles show to the same camera, at the price of rendering all of them.

Frozen: the teacher. Trained: the particles, by Adam whose eps of 1e-15 lets voxels of tiny gradients move; the fake score, a LoRA
adapter on the teacher's own backbone; for scenes, an embedding of the camera, added to the fake score's time embedding.

Wang et al., NeurIPS 2023, arXiv 2305.16213; weight, times, rank, learning rates and pose as in the official code. SDS: DreamFusion,
ICLR 2023, arXiv 2209.14988. The batch (the official code takes one view a step), t drawn for each sample, and an adapter without
weight decay are ours. Pictures are rendered in the space that the teacher denoises: no gradient goes through an encoder.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.data.images import save_gif
from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.errors import UserError
from fastdiff.losses import denoising, pseudo_target, reduce, variational_score_gradient
from fastdiff.models.pose import CameraEmbedding, added_to
from fastdiff.models.roles import Role, Roles
from fastdiff.models.scenes import SCENES, Camera, Scenes, load_scenes, save_scenes, turntable
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.method import (
    Batch,
    Calls,
    Delivered,
    Finished,
    Method,
    Paper,
    Preparation,
    Trial,
)
from fastdiff.trainers.trajectory import Generators


@dataclass(kw_only=True)
class ProlificDreamer(Method):
    """Particles (images or 3-D scenes) by variational score distillation, or by SDS; ends with scenes, not with a network.

    A run's prompts come in groups of ``views``: prompt ``k`` of a group describes what is seen from the k-th sector of azimuth
    (``fastdiff.models.scenes.camera.by_direction`` writes such groups). Particle i belongs to group ``i mod groups``.
    """

    info: ClassVar[Paper] = Paper(
        title="ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
        venue="NeurIPS",
        year=2023,
        arxiv="2305.16213",
        sheet="few_step_diffusion.md: ProlificDreamer",
    )
    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields={
                "particles": 64,
                "guidance_scale": 1.0,
                "lr": 5e-3,
                "fake_score_lr": 2e-3,
                "rank": 16,
                "anneal_after": 1200,
            },
            bounds={"sliced_w2": 0.2, "mode_mass": 0.45, "stray": 0.1},
            max_steps=2000,
            batch_size=256,
            ema_decay=0.0,
        )
    }
    delivers: ClassVar[Literal["pipeline", "scenes"]] = "scenes"

    scene: Literal["images", "voxels", "gaussians"] = "images"
    """What a particle is: a sample itself, a voxel radiance field, or anisotropic 3-D Gaussians."""
    scene_size: int = 16
    """Voxels along an edge, or number of Gaussians; images have no use for it."""
    particles: int = 4
    """How many are trained together."""
    start_from: Path | None = None
    """Folder of a finished run to go on from; its scenes must be of the same kind and number."""
    texture_only: bool = False
    """Keep the geometry and train only colours: the last stage of the paper."""
    score: Literal["vsd", "sds", "cloud"] = "vsd"
    """What is subtracted from the prior's noise: a trained fake score, the drawn noise, or the particles' own law."""
    guidance_scale: float = 7.5
    """Guidance of the prior; 1 is off. The fake score is never guided."""
    lr: float = 1e-3
    """Learning rate of the particles; for scenes 1e-2."""
    fake_score_lr: float = 1e-4
    """Learning rate of the fake score's adapter and of the camera's embedding."""
    rank: int = 4
    """LoRA rank of the fake score; alpha is the rank."""
    anneal_after: int = 5000
    """Iterations after which t is drawn from 20..500 only."""
    entropy_weight: float = 0.0
    """Weight, in these later iterations, of the binary entropy of opacity in bits, which clears fog (official code: 10)."""
    views: int = 1
    """Number of sectors of azimuth that have prompts of their own; the first is centred at 0 degrees."""
    cameras: int = 0
    """Draw azimuths from so many equal steps; 0 draws them from the whole circle."""
    elevation: tuple[float, float] = (0.0, 30.0)
    """Range of elevations in degrees; ours."""
    pose_dropout: float = 0.1
    """How often the fake score learns without the camera's pose."""

    def __post_init__(self) -> None:
        for name in ("scene_size", "particles", "rank", "views"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.scene not in SCENES:
            raise UserError(f"scene is {self.scene!r}: expected one of {', '.join(SCENES)}.")
        if self.score not in ("vsd", "sds", "cloud"):
            raise UserError(f"score is {self.score!r}: expected vsd, sds or cloud.")
        if not 0 <= self.pose_dropout <= 1:
            raise UserError(f"pose_dropout is {self.pose_dropout}: it must be in [0, 1].")
        if self.entropy_weight and not self.three_d:
            raise UserError("entropy_weight is set, and free images have no opacity: it would do nothing. Leave it at 0.")
        if self.texture_only and not self.three_d:
            raise UserError("texture_only is set, and free images have no geometry to keep: train them in full.")

    @classmethod
    def name(cls) -> str:
        return "prolific-dreamer"

    @property
    def three_d(self) -> bool:
        """Whether a camera matters."""
        return self.scene != "images"

    # --- the roles

    def build(self, teacher: Teacher) -> Scenes:
        """The particles before the first iteration."""
        if self.start_from is not None:
            scenes = load_scenes(self.start_from, texture_only=self.texture_only)
        else:
            options: dict[str, Any] = {"size": self.scene_size} if self.three_d else {}
            options["seed"] = int(torch.randint(2**31, (), device="cpu"))  # the engine seeded the global generator
            scenes = SCENES[self.scene](self.particles, teacher.latent_shape, texture_only=self.texture_only, **options)
        if scenes.kind != self.scene or scenes.n != self.particles or scenes.shape != teacher.latent_shape:
            raise UserError(
                f"{self.start_from} holds {scenes.n} {scenes.kind} of shape {scenes.shape}, and this run asks for {self.particles} "
                f"{self.scene} of {teacher.latent_shape}. Give the same scene and particles."
            )
        return scenes

    def roles(self) -> dict[str, Role]:
        roles = {"student": Role(train="module", lr=self.lr, betas=(0.9, 0.99), eps=1e-15, build=self.build)}
        if self.score == "vsd":
            roles["fake_score"] = Role(train="lora", lr=self.fake_score_lr, rank=self.rank, lora_alpha=self.rank)
            if self.three_d:
                roles["camera"] = Role(train="module", lr=self.fake_score_lr, build=_camera_embedding)
        return roles

    def validate(self, teacher: Teacher) -> None:
        if self.three_d and len(teacher.latent_shape) != 3:
            raise UserError(
                f"{teacher.name} has samples of shape {teacher.latent_shape}, and {self.scene} show pictures [C, H, W]: use images."
            )
        if self.three_d and self.score == "vsd":
            _camera_embedding(teacher)

    def prepare(self, preparation: Preparation) -> None:
        if len(preparation.prompts) % self.views:
            raise UserError(
                f"{len(preparation.prompts)} prompts in groups of views={self.views}: the last group would lack a view. Give one "
                "prompt for each sector of azimuth (by_direction makes them)."
            )

    # --- an iteration

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        ranges = {"student_t": (20, 980), "annealed_t": (20, 500)}
        return ranges | ({"fake_t": (0, LEVELS - 1)} if self.score == "vsd" else {})

    def updates(self, step: int) -> tuple[str, ...]:
        first = "student" if step < self.anneal_after else "annealed"
        return (first, "fake_score") if self.score == "vsd" else (first,)

    def trains(self, update: str) -> tuple[str, ...]:
        if update == "fake_score":
            return ("fake_score", "camera") if self.three_d else ("fake_score",)
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        shown = 1 + (self.particles if self.score == "cloud" else 0)
        asked = {"student": Calls(shown, 1), "teacher": Calls(1 if self.guidance_scale == 1 else 2, 0)}
        return asked | ({"fake_score": Calls(2, 1)} if self.score == "vsd" else {})

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == "fake_score":
            return self._fake_score_loss(batch, roles)
        terms: dict[str, Tensor] = {self.score: self._particle_loss(update, batch, roles)}
        if update == "annealed" and self.entropy_weight:
            opacity = roles.modules["student"].opacity(self._particle(batch), self._camera(batch))  # type: ignore[operator]
            terms["entropy"] = self.entropy_weight * _entropy(opacity).mean()
        return terms

    def _particle_loss(self, update: str, batch: Batch, roles: Roles) -> Tensor:
        x = roles.generate("student", self._particle(batch), self._camera(batch))
        batch.memo["x"] = x.detach()
        t, eps = self.times(f"{update}_t", batch), batch.noise("student_eps")
        with torch.no_grad():
            process, cond = roles.teacher.process, self._cond(batch)
            x_t = process.add_noise(x, eps, t)
            real = roles.denoiser("teacher").guided(x_t, t, cond, batch.null, self.guidance_scale)
            weight = expand((process.sigma(t) / process.norm(t)).square(), x)
            gradient = variational_score_gradient(real.eps, self._subtracted(x_t, t, eps, batch, roles), weight=weight)
        return reduce(pseudo_target(x, gradient), denominator=len(x))

    def _subtracted(self, x_t: Tensor, t: Tensor, eps: Tensor, batch: Batch, roles: Roles) -> Tensor:
        """eps_fake, and what stands in its place."""
        if self.score == "sds":
            return eps
        if self.score == "cloud":
            return self._cloud_eps(x_t, t, batch, roles)
        return self._fake_eps(x_t, t, self._cond(batch), self._camera(batch).pose, roles)

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, t, eps = batch.memo["x"], self.times("fake_t", batch), batch.noise("fake_eps")
        kept = batch.draws.uniform("pose") >= self.pose_dropout
        pose = self._camera(batch).pose * kept.to(x)[:, None, None]
        fake = self._fake_eps(roles.teacher.process.add_noise(x, eps, t), t, self._cond(batch), pose, roles)
        return {"fake_score": reduce(denoising(fake, eps))}

    def _fake_eps(self, x_t: Tensor, t: Tensor, cond: Any, pose: Tensor, roles: Roles) -> Tensor:
        """The fake score's noise; for scenes with the pose [B, 4, 4] in its time embedding."""
        seen: Any = nullcontext()
        if self.three_d:
            layer = roles.teacher.family.time_embedding(roles.backbone("fake_score"))[0]
            seen = added_to(layer, roles.modules["camera"](pose))
        with seen:
            return roles.denoiser("fake_score")(x_t, t, cond).eps

    def _cloud_eps(self, x_t: Tensor, t: Tensor, batch: Batch, roles: Roles) -> Tensor:
        """The noise that the law of the particles themselves predicts, ``sum_j pi_j (x_t - a g(theta_j, c)) / s``.

        ``pi`` is the softmax of ``-||x_t - a g(theta_j, c)||^2 / (2 s^2)`` over the particles of the sample's group.
        """
        n, camera = self.particles, self._camera(batch)
        every, groups = torch.arange(n, device=x_t.device), len(batch.prompts) // self.views
        rings = Camera(camera.azimuth.repeat_interleave(n), camera.elevation.repeat_interleave(n))
        shown = roles.generate("student", every.repeat(len(x_t)), rings).unflatten(0, (-1, n))
        alpha, sigma = (expand(c, shown) for c in (batch.teacher.process.alpha(t), batch.teacher.process.sigma(t)))
        noise = (x_t[:, None] - alpha * shown) / sigma
        fit = -0.5 * noise.flatten(2).square().sum(2)
        member = fit.masked_fill(every % groups != self._group(batch)[:, None], -torch.inf).softmax(1)
        return (expand(member.flatten(), noise.flatten(0, 1)).unflatten(0, (-1, n)) * noise).sum(1)

    # --- who is seen, from where, and what the prior is told about it

    def _particle(self, batch: Batch) -> Tensor:
        return batch.draws.integers("particle", 0, self.particles)

    def _group(self, batch: Batch) -> Tensor:
        return self._particle(batch) % (len(batch.prompts) // self.views)

    def _camera(self, batch: Batch) -> Camera:
        azimuth = batch.draws.uniform("azimuth")
        if self.cameras:
            azimuth = (azimuth * self.cameras).floor() / self.cameras
        low, high = self.elevation
        elevation = low + (high - low) * batch.draws.uniform("elevation")
        dtype = torch.get_default_dtype()
        return Camera((360 * azimuth).to(dtype), elevation.to(dtype))

    def _cond(self, batch: Batch) -> Any:
        if "seen" not in batch.memo:
            prompt = self._group(batch) * self.views + self._camera(batch).sector(self.views)
            batch.memo["seen"] = batch.prompts.conditions(prompt)
        return batch.memo["seen"]

    # --- what comes out

    def levels(self) -> list[int]:
        return []

    def draw(self, network: nn.Module, teacher: Teacher, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        """The particles in turn, each from the next of as many azimuths as there are samples of it."""
        del teacher, cond, generators
        index = torch.arange(len(noise), device=noise.device) % self.particles
        turns = -(-len(noise) // self.particles)
        ring = Camera.turntable(turns, elevation=sum(self.elevation) / 2, device=noise.device)
        which = torch.arange(len(noise), device=noise.device) // self.particles
        shown: Tensor = network(index, Camera(ring.azimuth[which], ring.elevation[which]))
        return shown

    def preview(self, roles: Roles, prompts: list[str], noise: Tensor) -> Tensor:
        return roles.teacher.decode(self.draw(roles.modules["student"], roles.teacher, noise, prompts))

    def deliver(self, finished: Finished) -> Delivered:
        """``scenes.safetensors`` with ``fastdiff.json``, read back; for 3-D scenes a turntable of all particles, side by side."""
        scenes, teacher, folder = finished.network, finished.teacher, finished.folder
        assert isinstance(scenes, Scenes)
        save_scenes(scenes, folder, finished.note)
        again = load_scenes(folder).to(finished.noise.device)
        with torch.no_grad():
            images, read = (teacher.decode(self.draw(s, teacher, finished.noise, None)) for s in (scenes, again))
            if self.three_d:
                film = teacher.decode(turntable(scenes, elevation=sum(self.elevation) / 2))
                save_gif(film, folder / "turntable.gif", columns=scenes.n)
        return Delivered(scenes, images, "reloaded scenes", (images - read).abs().max().item())


def _entropy(opacity: Tensor) -> Tensor:
    """Binary entropy in bits, of opacities kept 1e-5 from 0 and 1."""
    p = opacity.clamp(1e-5, 1 - 1e-5)
    return -p * p.log2() - (1 - p) * (1 - p).log2()


def _camera_embedding(teacher: Teacher) -> CameraEmbedding:
    try:
        width = teacher.family.time_embedding(teacher.family.backbone)[1]
    except NotImplementedError as error:
        raise UserError(
            f"{teacher.name}: {error} The fake score could not tell one view of a scene from another, and would blur them. Pass "
            "time_embedding=(layer, width) to Teacher.from_module, or take score='sds'."
        ) from error
    return CameraEmbedding(width)
