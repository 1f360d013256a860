"""A user's own network as a teacher, with and without a law that answers for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastdiff import Teacher, Trainer
from fastdiff.data.pairs import make_pairs
from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion import EDM, DiscreteVP, GaussianMixture, NoiseProcess, Prediction, RectifiedFlow, TrigFlow
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers import DMD2, ODEPairs, SwiftBrush

TABLE = torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)


def mlp(seed: int = 0, **options: int) -> TimeMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimeMLP(2, hidden=16, depth=2, **options)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, generator=generator), torch.randint(0, 1000, (5,), generator=generator)


def test_the_module_is_called_with_state_time_and_labels() -> None:
    network = mlp(classes=2)
    teacher = Teacher.from_module(network, DiscreteVP(TABLE), "v_prediction", shape=(2,), prompts=["0", "1"])
    x, t = inputs()
    labels = teacher.encode(["0", "1", "", "1", "0"])
    assert labels.tolist() == [0, 1, -1, 1, 0]
    prediction = teacher.denoiser(x, t, labels)
    a, s = teacher.process.alpha(t).float()[:, None], teacher.process.sigma(t).float()[:, None]
    assert torch.allclose(prediction.x0, a * x - s * network(x, t, labels), atol=1e-6)
    assert teacher.latent_shape == (2,)
    assert torch.equal(teacher.null, torch.tensor([-1]))


def test_network_time_is_that_of_the_process() -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
            seen.append(t)
            return 0 * x

    teacher = Teacher.from_module(Spy(), RectifiedFlow(), "flow_prediction", shape=(2,))
    x = torch.ones(2, 2)
    assert torch.equal(teacher.denoiser(x, torch.tensor([0.25, 1.0]), None).x0, x)
    assert seen[0].tolist() == [250.0, 1000.0]


def test_a_law_answers_for_the_teacher_and_the_network_only_starts_the_students() -> None:
    law = GaussianMixture.ring(DiscreteVP(TABLE))
    teacher = Teacher.from_module(mlp(), law.process, "v_prediction", shape=(2,), law=law)
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3)})
    x, t = inputs()
    assert torch.equal(roles.denoiser("teacher")(x, t, None).x0, law(x, t).x0)
    assert not torch.allclose(roles.denoiser("student")(x, t, None).x0, law(x, t).x0, atol=1e-2)
    assert dict(roles.ledger) == {"teacher": 5, "student": 5}
    guided = roles.denoiser("teacher").guided(x, t, torch.full((5,), -1), torch.full((5,), -1), 3.0)
    assert isinstance(guided, Prediction)
    assert roles.ledger["teacher"] == 15


def test_lora_roles_adapt_every_linear_layer_and_merge() -> None:
    teacher = Teacher.from_module(mlp(), DiscreteVP(TABLE), "v_prediction", shape=(2,))
    before = teacher.weights_hash()
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3), "fake": Role(train="lora", lr=1e-3, rank=4)})
    for p in roles.parameters("fake"):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    x, t = inputs()
    adapted = roles.denoiser("fake")(x, t, None).x0
    assert len(roles.parameters("fake")) == 2 * 3  # A and B of two hidden layers and the output
    assert (adapted - roles.denoiser("teacher")(x, t, None).x0).abs().max() > 1e-3
    merged = roles.merged("fake")
    assert set(merged.state_dict()) == set(mlp().state_dict())
    assert torch.allclose(teacher.family.network(merged)(x, t, None), roles.network("fake")(x, t, None), atol=1e-6)
    roles.close()
    assert teacher.weights_hash() == before


@pytest.mark.parametrize(
    "method", [ODEPairs(pairs=8, pair_steps=2), SwiftBrush(rank=2), DMD2(ratio=(1, 2))], ids=lambda method: method.name()
)
def test_the_whole_run_returns_the_reloadable_student(method: object, tmp_path: Path) -> None:
    teacher = Teacher.from_module(mlp(classes=2), DiscreteVP(TABLE), "v_prediction", shape=(2,), prompts=["0", "1"])
    run = Trainer(method, teacher, output_dir=tmp_path, max_steps=3, batch_size=4, warmup_steps=0, validate_every=2)
    network = run.train()
    assert run.result["export_max_abs_diff"] == 0
    assert not list(tmp_path.glob("validation/*"))  # a vector is no picture
    from fastdiff.pipelines.export import load_module

    again = mlp(seed=5, classes=2)
    load_module(again, tmp_path)
    x, t = inputs()
    labels = torch.tensor([0, 1, 0, 1, 0])
    assert torch.equal(again(x, t, labels), network(x, t, labels))
    assert not torch.equal(network(x, t, labels), teacher.family.backbone(x, t, labels))


def test_a_gan_on_a_network_without_bottleneck_is_refused_before_training(tmp_path: Path) -> None:
    teacher = Teacher.from_module(mlp(), DiscreteVP(TABLE), "v_prediction", shape=(2,))
    with pytest.raises(UserError, match="bottleneck"):
        Trainer(DMD2(gan_weight=1e-3), teacher, output_dir=tmp_path, max_steps=3).train()


@pytest.mark.parametrize(
    "process", [EDM(), RectifiedFlow(), TrigFlow(), DiscreteVP(TABLE).continuous()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_pairs_are_ends_of_exact_trajectories_under_any_process(process: NoiseProcess, solver: str) -> None:
    """ODE pairs once were nan, or made at the wrong times, under all but one process."""
    law = Gaussian.anisotropic(process)
    teacher = Teacher.from_module(mlp(), process, "sample", shape=law.shape, law=law)
    pairs = make_pairs(
        teacher, PromptTable([""], teacher), n=64, num_inference_steps=200, guidance_scale=1.0, seed=0, solver=solver
    )
    start = process.initial_scale * pairs.noise.double()
    end = law.consistency(start, process.at_level(torch.tensor(999)).expand(64))
    error = ((pairs.x0 - end).square().sum(1).mean() / end.square().sum(1).mean()).sqrt()
    assert error < (0.03 if solver == "ddim" else 0.01)


def test_a_law_of_another_process_or_shape_is_refused() -> None:
    law = GaussianMixture.ring(EDM())
    with pytest.raises(UserError, match=r"law\.under"):
        Teacher.from_module(mlp(), DiscreteVP(TABLE), "sample", shape=(2,), law=law)
    with pytest.raises(UserError, match="shape"):
        Teacher.from_module(mlp(), DiscreteVP(TABLE), "sample", shape=(3,), law=law.under(DiscreteVP(TABLE)))


# --- what cannot work is said at once


def small(module: nn.Module, **options: object) -> Teacher:
    return Teacher.from_module(module, DiscreteVP(TABLE), **{"prediction_type": "epsilon", "shape": (2,), **options})


def test_an_unknown_prediction_type_is_refused_when_the_teacher_is_made() -> None:
    with pytest.raises(UserError, match=r"'eps'.*epsilon"):
        small(mlp(), prediction_type="eps")


def test_captions_without_encode_are_refused_with_what_to_pass() -> None:
    with pytest.raises(UserError, match="encode="):
        small(mlp()).encode(["a cat"])


def test_an_output_that_would_be_broadcast_is_refused() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
            return self.layer(x)

    x, t = inputs()
    with pytest.raises(ValueError, match=r"\(5, 1\) for x_t \(5, 2\)"):
        small(Narrow()).denoiser(x, t, None)


def test_lora_on_a_network_without_linear_layers_asks_for_targets() -> None:
    teacher = small(nn.Conv2d(1, 1, 1), shape=(1, 2, 2))
    with pytest.raises(UserError, match="lora_targets="):
        Roles(teacher, {"student": Role(train="lora", lr=1e-3)})
    Roles(small(nn.Sequential(nn.Conv2d(1, 1, 1)), shape=(1, 2, 2), lora_targets=["0"]), {"student": Role(train="lora", lr=1e-3)})


def test_the_output_layer_of_torchs_attention_is_no_target_of_an_adapter() -> None:
    """``nn.MultiheadAttention`` reads that layer's weight itself: an adapter on it would compute nothing."""
    teacher = small(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "out": nn.Linear(4, 4)}), shape=(4,))
    assert teacher.family.lora_targets == ("out",)


def test_a_named_layer_is_what_a_discriminator_looks_at() -> None:
    """Its head judges the features of the role that is asked, noisy sample and time included; the output layer does not run."""
    teacher = Teacher.from_module(TimeMLP(2), RectifiedFlow(), "flow_prediction", shape=(2,), bottleneck=("hidden", 128))
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3)})
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.9])
    features = roles.features("student", x, t, None)
    network = roles.backbone("student")
    full: list[Tensor] = []
    handle = network.hidden.register_forward_hook(lambda module, inputs, output: full.append(output))
    roles.network("student")(x, 1000 * t, None)
    handle.remove()
    assert torch.equal(features, full[0])
    logits = teacher.family.head()(features)
    assert logits.shape == (3,)
    assert logits.unique().numel() == 3


def test_gradient_through_a_law_is_counted_as_the_teachers() -> None:
    law = GaussianMixture.ring(RectifiedFlow())
    teacher = Teacher.from_module(TimeMLP(2), law.process, "flow_prediction", shape=(2,), law=law)
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3)})
    x, t = torch.ones(5, 2, requires_grad=True), torch.full((5,), 0.5)
    roles.denoiser("teacher")(x, t, None).x0.sum().backward()
    assert roles.ledger == roles.backwards == {"teacher": 5}
    assert x.grad is not None


def test_the_layer_of_the_embedded_time_is_the_named_one_and_has_its_width() -> None:
    teacher = small(nn.Sequential(nn.Linear(2, 7), nn.Linear(7, 2)), time_embedding=("0", 7))
    layer, width = teacher.family.time_embedding(teacher.family.backbone)
    assert layer is teacher.family.backbone[0]
    assert layer(torch.zeros(3, 2)).shape == (3, width)
    with pytest.raises(NotImplementedError, match="embedded time"):
        small(mlp()).family.time_embedding(mlp())
