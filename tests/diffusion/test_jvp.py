"""Directional derivatives against closed forms, each other and ordinary gradients, and the measured choice among them."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from tiny import tiny_unet
from torch import Tensor, distributed, nn

from fastdiff.diffusion.jvp import (
    inner,
    jvp_central,
    jvp_forward,
    jvp_one_sided,
    math_attention,
    outside_autocast,
    random_state,
    replay,
    time_step,
)
from fastdiff.diffusion.jvp_choice import STEPS, choose_jvp


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Conditioned(nn.Module):
    """A diffusers network as f(x, t): its condition is a buffer, so that a copy takes it along."""

    def __init__(self, network: nn.Module, cond: Tensor, **extra: object) -> None:
        super().__init__()
        self.network, self.extra = network, extra
        self.register_buffer("cond", cond)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, timestep=t, encoder_hidden_states=self.cond, return_dict=False, **self.extra)[0]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def unet() -> Conditioned:
    return Conditioned(seeded(tiny_unet), normal(3, 16, 32, seed=1, dtype=torch.float32))


def pixart() -> Conditioned:
    def build() -> nn.Module:
        return PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=64,
            caption_channels=32,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )

    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return Conditioned(seeded(build), normal(3, 16, 32, seed=1, dtype=torch.float32), **extra)


def batch(dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, t) and (dx/dt, 1) of three samples, t in 0..1000 and in float64 as a process gives it."""
    t = torch.tensor([120.0, 480.0, 930.0], dtype=torch.float64)
    x, velocity = normal(3, 4, 8, 8, seed=2).to(dtype), 1e-3 * normal(3, 4, 8, 8, seed=3).to(dtype)
    return (x, t), (velocity, torch.ones_like(t))


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


MATRIX = normal(5, 5, seed=9)


def smooth(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x @ MATRIX * t[:, None])


def closed_form(x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
    inside = x @ MATRIX
    return torch.cos(inside * t[:, None]) * (dx @ MATRIX * t[:, None] + inside * dt[:, None])


SMOOTH = ((normal(4, 5), torch.tensor([0.3, 0.7, 1.1, 1.5]).double()), (normal(4, 5, seed=1), normal(4, seed=2)))


def test_forward_derivative_is_the_closed_form() -> None:
    primals, tangents = SMOOTH
    output, tangent = jvp_forward(smooth, primals, tangents)
    assert torch.equal(output, smooth(*primals))
    torch.testing.assert_close(tangent, closed_form(*primals, *tangents), rtol=1e-12, atol=1e-12)


def test_central_difference_is_second_order_and_the_one_sided_first() -> None:
    primals, tangents = SMOOTH
    exact, output = closed_form(*primals, *tangents), smooth(*primals)
    central = [relative(jvp_central(smooth, primals, tangents, step=h), exact) for h in (4e-3, 2e-3, 1e-3)]
    backward = [relative(jvp_one_sided(smooth, primals, tangents, output, step=h), exact) for h in (4e-3, 2e-3, 1e-3)]
    assert [coarse / fine for coarse, fine in zip(central, central[1:], strict=False)] == pytest.approx([4, 4], rel=0.02)
    assert [coarse / fine for coarse, fine in zip(backward, backward[1:], strict=False)] == pytest.approx([2, 2], rel=0.05)


def test_each_sample_has_its_own_step() -> None:
    """One h for a batch of times would be too coarse for the small ones; a step spread along x would scale columns."""
    primals, tangents = SMOOTH
    steps = torch.tensor([1e-3, 2e-3, 4e-3, 8e-3])
    together = jvp_central(smooth, primals, tangents, step=steps)
    for i, h in enumerate(steps.tolist()):
        alone = jvp_central(smooth, tuple(p[i : i + 1] for p in primals), tuple(v[i : i + 1] for v in tangents), step=h)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_time_step_moves_the_time_by_a_share_of_itself() -> None:
    t = torch.tensor([0.0, 0.5, 1.5]).double()
    premultiplied = t.cos() * t.sin()
    step = time_step((normal(3, 2), t), (normal(3, 2), premultiplied), 1e-2)
    torch.testing.assert_close(step[1:] * premultiplied[1:], 1e-2 * t[1:], rtol=1e-12, atol=0)
    assert step[0] == 1e-6  # no division by a tangent of zero
    assert time_step((t,), (torch.ones_like(t),)).tolist() == pytest.approx([1e-6, 5e-4, 1.5e-3])
    x, velocity = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    moved = (time_step((x,), (velocity,), 1e-2)[:, None, None] * velocity).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, 1e-2 * x.flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def test_plain_attention_has_no_forward_derivative() -> None:
    network, (primals, tangents) = unet(), batch()
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(network, primals, tangents)
    with math_attention():
        tangent = torch.func.jvp(network, primals, tangents)[1].detach()
    assert relative(jvp_forward(network, primals, tangents)[1], tangent) < 1e-5


@pytest.mark.parametrize("build", [unet, pixart])
def test_derivative_of_a_network_in_x(build: Callable[[], Conditioned]) -> None:
    """With t fixed, since diffusers embeds it in float32."""
    network, ((x, t), (velocity, _)) = build().double(), batch(torch.float64)
    output, tangent = jvp_forward(lambda x: network(x, t), (x,), (velocity,))
    assert relative(output, network(x, t)) < 1e-13
    central = jvp_central(lambda x: network(x, t), (x,), (velocity,), step=time_step((x,), (velocity,), 1e-4))
    assert relative(central, tangent) < 1e-6
    assert not output.requires_grad


def test_integer_times_are_closed_over() -> None:
    network, ((x, t), (velocity, _)) = unet().double(), batch(torch.float64)
    of_floats = jvp_forward(lambda x: network(x, t), (x,), (velocity,))[1]
    torch.testing.assert_close(jvp_forward(lambda x: network(x, t.long()), (x,), (velocity,))[1], of_floats, rtol=0, atol=0)


@pytest.mark.parametrize("build", [unet, pixart])
def test_single_call_gives_the_ordinary_gradients(build: Callable[[], Conditioned]) -> None:
    network, (primals, tangents) = build().double(), batch(torch.float64)
    weight = normal(*network(*primals).shape, seed=4)
    ordinary = torch.autograd.grad((weight * network(*primals)).sum(), list(network.parameters()))
    output, tangent = jvp_forward(network, primals, tangents, graph=True)
    single = torch.autograd.grad((weight * output).sum(), list(network.parameters()))
    for ours, theirs in zip(single, ordinary, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not tangent.requires_grad
    torch.testing.assert_close(tangent, jvp_forward(network, primals, tangents)[1], rtol=1e-12, atol=1e-12)


def test_single_call_keeps_its_graph_inside_no_grad() -> None:
    network, (primals, tangents) = unet(), batch()
    with torch.no_grad():
        assert jvp_forward(network, primals, tangents, graph=True)[0].requires_grad


def test_checkpointing_is_refused_before_the_backward_fails() -> None:
    network, (primals, tangents) = unet(), batch()
    network.network.enable_gradient_checkpointing()
    network.train()

    class Holder:
        def __init__(self) -> None:
            self.held = network

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return self.held(x, t)

    holder = Holder()
    for function in (network, network.forward, holder, lambda x, t: holder(x, t)):
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            jvp_forward(function, primals, tangents, graph=True)
    assert jvp_forward(network, primals, tangents)[1].norm() > 0
    network.network.disable_gradient_checkpointing()
    jvp_forward(network, primals, tangents, graph=True)[0].sum().backward()


def dropped(x: Tensor) -> Tensor:
    return nn.functional.dropout(x.square(), 0.5)


def test_differences_use_the_same_dropout_masks() -> None:
    """With a mask each, the difference of two outputs is of order one, and divided by the step it buries the derivative."""
    x, velocity, h = normal(3, 50), normal(3, 50, seed=1), 1e-4
    state = random_state([x])
    mask = dropped(x) / x.square()
    with replay(state):
        central = jvp_central(dropped, (x,), (velocity,), step=h)
    torch.testing.assert_close(central, mask * 2 * x * velocity, rtol=1e-8, atol=1e-8)
    state = random_state([x])
    output = dropped(x)
    torch.rand(3)
    after = torch.get_rng_state()
    backward = jvp_one_sided(dropped, (x,), (velocity,), output, step=h, rng=state)
    torch.testing.assert_close(backward, output / x.square() * (2 * x * velocity - h * velocity.square()), rtol=1e-8, atol=1e-8)
    assert torch.equal(torch.get_rng_state(), after)
    with replay(state):
        two_masks = (dropped(x + h * velocity) - dropped(x - h * velocity)) / (2 * h)
    assert relative(two_masks, central) > 100


def test_central_difference_draws_as_often_as_one_forward() -> None:
    x = normal(3, 5)
    state = random_state([x])
    dropped(x)
    after = torch.get_rng_state()
    with replay(state):
        jvp_central(dropped, (x,), (x,), step=1e-3)
        assert torch.equal(torch.get_rng_state(), after)


def test_one_sided_refuses_an_output_made_with_other_masks() -> None:
    x = normal(3, 50)
    with pytest.raises(ValueError, match="rng=random_state"):
        jvp_one_sided(dropped, (x,), (x,), dropped(x), step=1e-3)


def test_derivative_leaves_autocast_and_the_next_forward_still_trains() -> None:
    """A UNet raises inside a bf16 autocast, and a difference there is rounding over the step."""
    network, (primals, tangents) = unet(), batch()
    expected = jvp_forward(network, primals, tangents)[1]
    with torch.autocast("cpu", torch.bfloat16):
        with math_attention(), pytest.raises(RuntimeError, match=r"[Ii]nput type"):
            torch.func.jvp(network, primals, tangents)
        assert torch.equal(jvp_forward(network, primals, tangents)[1], expected)
        with pytest.raises(ValueError, match="inside autocast"):
            jvp_one_sided(network, primals, tangents, expected, step=1e-3)
        with torch.no_grad(), outside_autocast(primals), torch.autocast("cpu", torch.bfloat16):
            network(*primals)
        network(*primals).sum().backward()
    assert network.network.conv_in.weight.grad is not None


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_wrapped_networks_are_unwrapped() -> None:
    from torch.nn.parallel import DistributedDataParallel

    network, (primals, tangents) = unet().double(), batch(torch.float64)
    wrapped = torch.compile(DistributedDataParallel(torch.compile(network, backend="eager")), backend="eager")
    assert inner(wrapped) is network
    assert inner(network) is network
    expected = jvp_forward(network, primals, tangents)[1]
    assert torch.equal(jvp_forward(inner(wrapped), primals, tangents)[1], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("one_rank")
def test_sharded_networks_keep_their_wrapper() -> None:
    """FSDP2 goes through a jvp as it is and cannot be copied; inside FSDP1 are only flat shards."""
    from torch.distributed import device_mesh, fsdp

    network, (primals, tangents) = unet(), batch()
    expected = jvp_forward(network, primals, tangents)[1]
    with pytest.raises(TypeError, match="fully_shard"):
        inner(fsdp.FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu")))
    fsdp.fully_shard(network, mesh=device_mesh.init_device_mesh("cpu", (1,)))
    assert inner(network) is network
    choice = choose_jvp(network, primals, tangents)
    assert choice.name == "jvp"
    assert "float64 copy" in choice.refused
    assert relative(choice.estimate(network, primals, tangents, network(*primals)), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers")  # its new name is missing from older torch
@pytest.mark.usefixtures("one_rank")
def test_single_call_goes_through_the_ddp_object() -> None:
    """Through the inner module no rank would average its gradients. Broadcast buffers are the one thing that stops a jvp."""
    from torch.nn.parallel import DistributedDataParallel

    network, (primals, tangents) = unet().double(), batch(torch.float64)
    with pytest.raises(RuntimeError, match="in-place"):
        jvp_forward(DistributedDataParallel(network), primals, tangents)
    ordinary = torch.autograd.grad(network(*primals).square().sum(), list(network.parameters()))
    output, tangent = jvp_forward(DistributedDataParallel(network, broadcast_buffers=False), primals, tangents, graph=True)
    output.square().sum().backward()
    for parameter, gradient in zip(network.parameters(), ordinary, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    assert not tangent.requires_grad


@pytest.mark.parametrize("build", [unet, pixart])
def test_jvp_is_chosen_for_networks(build: Callable[[], Conditioned]) -> None:
    network, (primals, tangents) = build().train(), batch()
    before = copy.deepcopy(network.state_dict())
    choice = choose_jvp(network, primals, tangents)
    assert choice.name == "jvp"
    assert choice.errors["jvp"] < 1e-5
    assert choice.errors["jvp"] < choice.errors["central"] < choice.errors["one_sided"] < 0.1
    assert not choice.refused
    assert str(choice).startswith("jvp: its error is within 1e-03\nerrors against the forward derivative of a float64 copy: jvp ")
    tangent = choice.estimate(network, primals, tangents, network(*primals))
    assert torch.equal(tangent, jvp_forward(network, primals, tangents)[1])
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_function_that_holds_a_float32_network_is_judged_by_what_differences_can_tell() -> None:
    network, (primals, tangents) = unet(), batch()
    choice = choose_jvp(lambda x, t: network(x, t), primals, tangents)
    assert choice.name == "jvp"
    assert 1e-5 < choice.errors["jvp"] < 0.01  # its distance to the central difference, not the zero to itself
    assert "errors against the forward derivative: " in str(choice)


class Sine(torch.autograd.Function):
    """A fused kernel: no forward derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: Tensor) -> None: ...


class OldSine(torch.autograd.Function):
    """The same in the form that functorch cannot enter."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sin()


class WrongSine(Sine):
    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return 0.9 * tangent


@torch.library.custom_op("fastdiff_test::sine", mutates_args=())
def silent_sine(x: Tensor) -> Tensor:
    """The way newer attention kernels are registered: torch gives it a tangent of zero and no error."""
    return x.sin()


@pytest.mark.parametrize(
    ("sine", "reason"),
    [
        (Sine.apply, "must implement the jvp function"),
        (OldSine.apply, "setup_context"),
        (WrongSine.apply, "wrong tangent"),
        (silent_sine, "wrong tangent, or a zero"),
    ],
    ids=["no jvp", "no setup_context", "wrong jvp", "custom operator"],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_kernel_without_a_right_forward_derivative_is_refused(
    sine: Callable[[Tensor], Tensor], reason: str, as_module: bool
) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return sine(x * t[:, None])

    primals, tangents = SMOOTH
    choice = choose_jvp(Network() if as_module else Network().forward, primals, tangents)
    assert choice.name == "one_sided"
    assert reason in choice.refused["jvp"]
    assert choice.refused["jvp"] in str(choice)
    assert str(choice).startswith("one_sided with a step of 1e-05: jvp was refused")
    assert choice.errors["one_sided"] < 1e-4
    x, t = primals
    exact = torch.cos(x * t[:, None]) * (tangents[0] * t[:, None] + x * tangents[1][:, None])
    assert relative(choice.estimate(Network(), primals, tangents, Network()(*primals)), exact) < 1e-4


def test_estimate_repeats_the_masks_of_the_output() -> None:
    """For either choice: a tangent whose masks are not those of the output belongs to another network."""

    def function(sine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.dropout(sine(x), 0.5)

    x, velocity = normal(3, 50), normal(3, 50, seed=1)
    for sine, name in ((torch.sin, "jvp"), (Sine.apply, "one_sided")):
        choice = choose_jvp(function(sine), (x,), (velocity,))
        assert choice.name == name
        state = random_state([x])
        output = function(sine)(x)
        tangent = choice.estimate(function(sine), (x,), (velocity,), output, rng=state)
        torch.testing.assert_close(tangent, output / x.sin() * x.cos() * velocity, rtol=1e-3, atol=1e-3)


def test_half_precision_keeps_jvp_above_the_tolerance() -> None:
    """In bf16 every estimator is worse than 1e-3; the differences are mostly rounding."""
    network = unet().bfloat16()
    (x, t), (velocity, one) = batch(torch.bfloat16)
    choice = choose_jvp(network, (x, t), (velocity, one))
    assert choice.name == "jvp"
    assert 1e-3 < choice.errors["jvp"] < 0.1 < choice.errors["one_sided"]
    assert "above 1e-03" in str(choice)
    with pytest.raises(ValueError, match="confirm no derivative"):
        choose_jvp(lambda x, t: network(x, t), (x, t), (velocity, one))


def test_half_precision_without_a_forward_derivative_has_no_estimator() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = unet().bfloat16()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return Sine.apply(self.network(x, t))

    with pytest.raises(ValueError, match="no estimator comes within 10%"):
        choose_jvp(Fused(), *batch(torch.bfloat16))


def test_nan_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="confirm no derivative"):
        choose_jvp(torch.log, (-normal(4, 5).abs(),), (normal(4, 5, seed=1),))


class Exhausted(Sine):
    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")


def test_other_errors_are_not_taken_for_a_missing_derivative() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        choose_jvp(Exhausted.apply, (normal(2, 3),), (normal(2, 3),))
    with pytest.raises(RuntimeError, match="size of tensor"):
        choose_jvp(lambda x: x + torch.ones(7), (normal(2, 3),), (normal(2, 3),))
    with pytest.raises(TypeError, match=r"tuple, not a tensor"):
        choose_jvp(lambda x: (x,), (normal(2, 3),), (normal(2, 3),))


def test_each_difference_gets_the_step_that_measured_best() -> None:
    primals, tangents = SMOOTH
    choice, exact, output = choose_jvp(smooth, primals, tangents), closed_form(*primals, *tangents), smooth(*primals)
    sizes = {r: time_step(primals, tangents, r) for r in STEPS}
    central = {r: relative(jvp_central(smooth, primals, tangents, step=h), exact) for r, h in sizes.items()}
    one_sided = {r: relative(jvp_one_sided(smooth, primals, tangents, output, step=h), exact) for r, h in sizes.items()}
    assert central[choice.central_step] == min(central.values())
    assert one_sided[choice.step] == min(one_sided.values())


def test_network_is_measured_without_dropout_and_left_in_train_mode() -> None:
    class Watched(nn.Module):
        seen: tuple[bool, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            Watched.seen += (self.training,)
            return x.sin()

    network = Watched().train()
    choose_jvp(network, (normal(4, 5, dtype=torch.float32),), (normal(4, 5, dtype=torch.float32),))
    assert Watched.seen
    assert not any(Watched.seen)
    assert network.training


def test_network_that_cannot_be_copied_is_measured_alone() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.shift = seeded(lambda: nn.Linear(5, 5)), torch.ones(5)

        def __deepcopy__(self, memo: dict) -> nn.Module:
            raise AssertionError("FSDP does not support deepcopy.")

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).tanh()

    x, velocity = normal(4, 5, dtype=torch.float32), normal(4, 5, seed=1, dtype=torch.float32)
    choice = choose_jvp(Fixed(), (x,), (velocity,))
    assert choice.name == "jvp"
    assert "float64 copy not measured: FSDP does not support deepcopy." in str(choice)
