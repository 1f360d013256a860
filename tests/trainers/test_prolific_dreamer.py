"""ProlificDreamer: what its losses are, term by term; SDS as its special case; what the particles of a run become."""

import dataclasses
from pathlib import Path

import pytest
import torch
from short_runs import shake, started
from torch import Tensor

from fastdiff import Teacher, Trainer
from fastdiff.diffusion.exact import GaussianMixture, PointCloud
from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.pose import CameraEmbedding, added_to
from fastdiff.models.roles import Roles
from fastdiff.models.scenes import Camera, FreeImages, load_scenes
from fastdiff.proof import laws
from fastdiff.trainers import ProlificDreamer
from fastdiff.trainers.method import Batch, Method

VARIANTS: dict[str, Method] = {
    "images-vsd": ProlificDreamer(particles=3, anneal_after=2),
    "images-cloud": ProlificDreamer(particles=3, anneal_after=2, score="cloud"),
    "voxels-vsd": ProlificDreamer(
        scene="voxels", scene_size=4, particles=2, anneal_after=2, entropy_weight=0.1, views=2, cameras=4, lr=1e-2
    ),
    "gaussians-sds": ProlificDreamer(scene="gaussians", scene_size=4, particles=2, anneal_after=2, score="sds", texture_only=True),
}


def variant(name: str, **fields: object) -> ProlificDreamer:
    return dataclasses.replace(VARIANTS[name], **fields)  # type: ignore[return-value,type-var]


def student_gradient(run: Trainer, update: str = "student") -> Tensor:
    """Of all particles, flat; nothing is left behind."""
    run._backward(update, run._micro_batches(0), ("student",))
    found = torch.cat([p.grad.flatten() for p in run._roles.parameters("student")])
    for p in run._roles.parameters("student"):
        p.grad = None
    return found


# --- the gradient of a particle


class NoiseAsFake(ProlificDreamer):
    """VSD whose fake score answers with the noise that was drawn."""

    def _fake_eps(self, x_t: Tensor, t: Tensor, cond: object, pose: Tensor, roles: Roles) -> Tensor:
        return self.drawn.noise("student_eps")

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        self.drawn = batch
        return super().loss(update, batch, roles)


@pytest.mark.parametrize("name", ["images-vsd", "voxels-vsd"])
def test_with_eps_for_the_fake_score_vsd_is_sds_to_the_bit(name: str, tmp_path: Path) -> None:
    vsd = NoiseAsFake(**dataclasses.asdict(VARIANTS[name]))
    with started(vsd, tmp_path / "vsd") as one, started(variant(name, score="sds"), tmp_path / "sds") as other:
        gradient = student_gradient(one)
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, student_gradient(other))


def test_the_gradient_is_the_formula_with_guidance_on_the_prior_alone(tmp_path: Path) -> None:
    with started(variant("images-vsd", guidance_scale=3.0), tmp_path) as run:
        shake(run)
        got = student_gradient(run).view(3, 4, 8, 8)
        batch, roles, process = run._micro_batches(0)[0], run._roles, run.teacher.process
        index = batch.draws.integers("particle", 0, 3)
        x, t, eps = roles.modules["student"].samples.detach()[index], batch.times("student_t", 20, 980), batch.noise("student_eps")
        alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
        x_t, cond = alpha * x + sigma * eps, batch.prompts.conditions(index)
        with torch.no_grad():
            null, seen = (roles.network("teacher")(x_t, t, c) for c in (batch.null, cond))
            difference = null + 3.0 * (seen - null) - roles.network("fake_score")(x_t, t, cond)
        want = torch.zeros(3, 4, 8, 8).index_add(0, index, sigma.square() * difference / 4)
        assert (got - want).norm() < 1e-5 * want.norm()


def test_particles_alone_receive_what_their_own_samples_give(tmp_path: Path) -> None:
    with started(variant("images-vsd", particles=40), tmp_path) as run:
        shake(run)
        batch = run._micro_batches(0)[0]
        drawn = set(batch.draws.integers("particle", 0, 40).tolist())
        gradient = student_gradient(run).view(40, -1)
        assert {i for i in range(40) if gradient[i].abs().max() > 0} == drawn


def gaussian(n: int, mean: float, spread: float) -> tuple[Teacher, ProlificDreamer]:
    """A normal prior N(0, 1) in the plane, and free images that follow N(mean, spread^2) under their exact score."""
    law = GaussianMixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), laws.process())
    teacher = Teacher.from_module(TimeMLP(2), law.process, "epsilon", shape=(2,), law=law, name="normal")
    other = GaussianMixture(torch.full((1, 2), mean), torch.tensor([spread**2]), torch.ones(1), laws.process())

    class Exact(ProlificDreamer):
        def build(self, teacher: Teacher) -> FreeImages:
            scenes = FreeImages(n, (2,))
            scenes.samples.data = other.sample(n, torch.Generator().manual_seed(0)).float()
            return scenes

        def _fake_eps(self, x_t: Tensor, t: Tensor, cond: object, pose: Tensor, roles: Roles) -> Tensor:
            return other(x_t, t).eps

    return teacher, Exact(particles=n, guidance_scale=1.0)


def test_at_the_prior_itself_the_mean_gradient_is_zero_and_elsewhere_it_points_back(tmp_path: Path) -> None:
    found = []
    for mean, spread in ((0.0, 1.0), (0.5, 1.0), (0.0, 2.0)):
        teacher, method = gaussian(64, mean, spread)
        with started(method, tmp_path / f"{mean}-{spread}", teacher, batch_size=4096) as run:
            found.append((student_gradient(run).view(64, 2), run._roles.modules["student"].samples.detach()))
    assert found[0][0].abs().max() < 1e-8
    assert (found[1][0].sum(0) > 0.05).all()  # descent goes towards 0 from 0.5
    gradient, x = found[2]
    assert (gradient * x).sum() > 0.05  # inwards, where the cloud is too wide


def test_one_particle_is_its_own_cloud_and_sds(tmp_path: Path) -> None:
    """The optimal fake score of a point mass answers ``(x_t - a x) / s``, which is eps."""
    with started(variant("images-cloud", particles=1), tmp_path / "cloud") as one:
        cloud = student_gradient(one)
    with started(variant("images-cloud", particles=1, score="sds"), tmp_path / "sds") as other:
        sds = student_gradient(other)
    assert (cloud - sds).norm() < 1e-5 * sds.norm()


def test_the_clouds_noise_is_that_of_its_empirical_law(tmp_path: Path) -> None:
    method = variant("images-cloud", particles=6)
    with started(method, tmp_path) as run:
        run.prompts.prompts = run.prompts.prompts[:2]  # two groups of three particles
        batch = run._micro_batches(0)[0]
        samples = run._roles.modules["student"].samples.detach()
        index, t, eps = method._particle(batch), batch.times("t", 700, 980), batch.noise("n")
        x_t = run.teacher.process.add_noise(samples[index], eps, t)
        got = method._cloud_eps(x_t, t, batch, run._roles)
        for b, i in enumerate(index.tolist()):
            law = PointCloud(samples[i % 2 :: 2], run.teacher.process)
            assert torch.allclose(got[b], law(x_t[b : b + 1], t[b : b + 1]).eps[0], atol=1e-4)


# --- the fake score


def test_without_its_adapter_the_fake_score_is_the_prior(tmp_path: Path) -> None:
    """A new adapter and a new camera change nothing; shaken ones do, and leave the teacher as it was."""
    with started(variant("voxels-vsd"), tmp_path) as run:
        batch, method = run._micro_batches(0)[0], run.method
        x_t, t, pose = batch.noise("x"), batch.times("t", 20, 980), Camera.turntable(4).pose

        def both() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                fake = method._fake_eps(x_t, t, batch.cond, pose, run._roles)
                return run._roles.denoiser("teacher")(x_t, t, batch.cond).eps, fake

        teacher, fake = both()
        assert torch.equal(teacher, fake)
        shake(run)
        again, moved = both()
        assert torch.equal(teacher, again)
        assert (moved - teacher).abs().max() > 1e-3
        turned = method._fake_eps(x_t, t, batch.cond, pose.roll(1, 0), run._roles)
        assert (turned - moved).abs().max() > 1e-4


def test_the_fake_score_learns_fresh_noise_on_the_detached_render(tmp_path: Path) -> None:
    with started(variant("voxels-vsd", pose_dropout=0.0), tmp_path) as run:
        shake(run)
        batch, method = run._micro_batches(0)[0], run.method
        method.loss("student", batch, run._roles)
        x = batch.memo["x"]
        assert not x.requires_grad
        got = method.loss("fake_score", batch, run._roles)["fake_score"]
        t, eps = batch.times("fake_t", 0, 999), batch.noise("fake_eps")
        assert not torch.equal(eps, batch.noise("student_eps"))
        x_t = run.teacher.process.add_noise(x, eps, t)
        fake = method._fake_eps(x_t, t, method._cond(batch), method._camera(batch).pose, run._roles)
        assert got.item() == pytest.approx((fake - eps).square().mean().item(), rel=1e-5)


def test_the_pose_is_dropped_as_often_as_said(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(ProlificDreamer):
        def _fake_eps(self, x_t: Tensor, t: Tensor, cond: object, pose: Tensor, roles: Roles) -> Tensor:
            seen.append(pose)
            return super()._fake_eps(x_t, t, cond, pose, roles)

    for share in (0.0, 1.0):
        seen.clear()
        with started(Watched(**dataclasses.asdict(variant("voxels-vsd", pose_dropout=share))), tmp_path / f"{share}") as run:
            run._iteration(0)
        student, fake = seen
        assert torch.equal(fake, torch.zeros_like(student) if share else student)


def test_a_vector_is_added_to_a_layer_inside_and_only_there() -> None:
    layer, camera = torch.nn.Linear(3, 5), CameraEmbedding(5)
    x, pose = torch.randn(2, 3), Camera.turntable(2).pose
    plain = layer(x)
    with added_to(layer, camera(pose)):
        assert torch.equal(layer(x), plain)
    camera.last.bias.data.fill_(2.0)
    with added_to(layer, camera(pose)):
        assert torch.allclose(layer(x), plain + 2)
    assert torch.equal(layer(x), plain)


# --- views, phases, stages


def test_what_the_prior_is_told_is_what_the_camera_sees(tmp_path: Path) -> None:
    method = variant("voxels-vsd", particles=3, views=4, cameras=8)
    with started(method, tmp_path, batch_size=64) as run:  # 8 prompts: two groups of four views
        batch = run._micro_batches(0)[0]
        azimuth = method._camera(batch).azimuth
        assert set((azimuth / 45).tolist()) == set(range(8))
        want = (method._particle(batch) % 2) * 4 + ((azimuth + 45) // 90 % 4).long()
        assert torch.equal(method._cond(batch), run.prompts.conditions(want))


def test_cameras_are_drawn_from_the_whole_circle_and_range(tmp_path: Path) -> None:
    method = variant("voxels-vsd", cameras=0, elevation=(-10.0, 45.0))
    with started(method, tmp_path, batch_size=2000) as run:
        camera = method._camera(run._micro_batches(0)[0])
    assert camera.azimuth.min() < 2
    assert camera.azimuth.max() > 358
    assert -10 <= camera.elevation.min() < -9
    assert 44 < camera.elevation.max() <= 45


def test_prompts_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="views=3"), started(variant("voxels-vsd", views=3), tmp_path):
        pass


def test_a_teacher_that_names_no_time_embedding_is_refused_for_scenes_alone(tmp_path: Path) -> None:
    law = GaussianMixture.images(laws.process())
    known = laws.LAWS["images"]
    teacher = Teacher.from_module(known.network(), law.process, "v_prediction", shape=law.shape, law=law, name="i", **known.options)
    with pytest.raises(UserError, match="time_embedding"):
        Trainer(variant("voxels-vsd"), teacher, output_dir=tmp_path)
    Trainer(variant("voxels-vsd", score="sds"), teacher, output_dir=tmp_path)


def test_later_iterations_draw_smaller_times_and_clear_fog(tmp_path: Path) -> None:
    method = variant("voxels-vsd")
    assert [method.updates(s)[0] for s in range(4)] == ["student", "student", "annealed", "annealed"]
    with started(method, tmp_path, batch_size=120) as run:
        batch = run._micro_batches(0)[0]
        assert set(method.loss("student", batch, run._roles)) == {"vsd"}
        entropy = method.loss("annealed", batch, run._roles)["entropy"]
        assert 0 < entropy <= 0.1  # at most one bit a pixel, times the weight
        t = method.times("annealed_t", batch)
    assert 20 <= t.min() < 50
    assert 470 < t.max() <= 500


def test_a_texture_stage_keeps_the_geometry_of_the_run_before(tmp_path: Path) -> None:
    first = variant("voxels-vsd", score="sds")
    with started(first, tmp_path / "first", max_steps=3) as run:
        run._loop()
        before = run._finish()
    second = dataclasses.replace(first, texture_only=True, start_from=tmp_path / "first", entropy_weight=0.0)
    with started(second, tmp_path / "second", max_steps=3, warmup_steps=0) as run:
        run._loop()
        run._finish()
    after = load_scenes(tmp_path / "second")
    assert torch.equal(after.density, before.density)
    assert (after.colour - before.colour).abs().max() > 1e-3
    with pytest.raises(UserError, match="asks for 5"), started(dataclasses.replace(second, particles=5), tmp_path / "third"):
        pass


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scene": "mesh"}, "scene"),
        ({"score": "ism"}, "score"),
        ({"pose_dropout": 2.0}, "pose_dropout"),
        ({"particles": 0}, "particles"),
        ({"entropy_weight": 1.0}, "opacity"),
        ({"texture_only": True}, "geometry"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ProlificDreamer(**fields)


# --- the ring


def on_the_ring(score: str, folder: Path) -> Tensor:
    """64 free particles after 1,500 iterations with exact scores, a few seconds."""
    method = ProlificDreamer(particles=64, guidance_scale=1.0, score=score, lr=2e-2, anneal_after=800)
    options = {"max_steps": 1500, "batch_size": 128, "ema_decay": 0.0, "log_every": 500, "save_every": 2000, "warmup_steps": 50}
    with started(method, folder, _bare_ring(), **options) as run:
        run._loop()
        return run._roles.modules["student"].samples.detach()


def _bare_ring() -> Teacher:
    """The law with an untrained network, which nobody asks."""
    law = laws.exact("ring")
    return Teacher.from_module(TimeMLP(2), law.process, "v_prediction", shape=(2,), law=law, name="ring")


def mean_distance(x: Tensor) -> float:
    return (torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))).item()


def test_sds_collapses_where_vsd_covers_every_mode(tmp_path: Path) -> None:
    """64 particles: VSD has 7 to 9 in each of 8 modes at the sheet's radius 2.006, SDS none in any.

    The sheet's SDS ends at radius 0.39; that is without the smaller times of the later iterations, which push it out to 1.06.
    """
    law = laws.exact("ring")
    sds, vsd = on_the_ring("sds", tmp_path / "sds"), on_the_ring("cloud", tmp_path / "vsd")
    nearest = torch.cdist(vsd.double(), law.means).min(1)
    assert (nearest.values < 4 * 0.15).all()
    counts = torch.bincount(nearest.indices, minlength=8)
    assert counts.min() >= 7
    assert counts.max() <= 9
    assert vsd.norm(dim=1).mean().item() == pytest.approx(2.006, abs=0.03)
    assert mean_distance(vsd) == pytest.approx(2.6, abs=0.08)
    assert (torch.cdist(sds.double(), law.means).min(1).values > 4 * 0.15).all()
    assert sds.norm(dim=1).mean() < 1.3
    assert mean_distance(sds) < 1.7
