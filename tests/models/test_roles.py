"""Roles on one frozen backbone: who computes, who trains, and what is left of the teacher afterwards."""

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import tiny_teacher
from torch import nn

from fastdiff.models.roles import Role, Roles, Start
from fastdiff.models.teacher import Teacher

LORA = Role(train="lora", lr=1e-3, rank=4, lora_alpha=8.0)


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher()


@pytest.fixture
def adapters(teacher: Teacher) -> Iterator[Roles]:
    """Two adapters on the teacher's backbone, with random weights (a fresh one computes the backbone itself)."""
    roles = Roles(teacher, {"student": LORA, "fake_score": LORA})
    shake(roles, "student", 1)
    shake(roles, "fake_score", 2)
    yield roles
    roles.close()


def shake(roles: Roles, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in roles.parameters(name):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def inputs(teacher: Teacher, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, torch.tensor([300, 999]), teacher.encode(["a red boot on a white background", "a bag"])


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


# --- who computes


def test_the_teacher_is_the_untouched_base_before_and_after_training_an_adapter(teacher: Teacher) -> None:
    batch = inputs(teacher)
    before = teacher.denoiser(*batch).x0
    roles = Roles(teacher, {"fake_score": LORA})
    assert torch.equal(roles.denoiser("teacher")(*batch).x0, before)
    assert torch.equal(roles.denoiser("fake_score")(*batch).x0, before)  # fresh: B = 0
    roles.train_only("fake_score")
    optimizer = torch.optim.AdamW(roles.parameters("fake_score"), lr=1e-2)
    for _ in range(10):
        roles.denoiser("fake_score")(*batch).x0.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(roles.denoiser("teacher")(*batch).x0, before)
    assert torch.equal(teacher.denoiser(*batch).x0, before)
    assert not torch.allclose(roles.denoiser("fake_score")(*batch).x0, before, rtol=1e-2)
    roles.close()


def test_each_adapter_computes_alone(adapters: Roles, teacher: Teacher) -> None:
    """Adapters that stay active add up: the fake score would then also contain the student."""
    batch = inputs(teacher)
    for name in ("student", "fake_score"):
        alone = Roles(tiny_teacher(), {name: LORA})
        for mine, theirs in zip(alone.parameters(name), adapters.parameters(name), strict=True):
            mine.data.copy_(theirs)
        assert torch.equal(adapters.denoiser(name)(*batch).x0, alone.denoiser(name)(*batch).x0)
    outputs = [adapters.denoiser(name)(*batch).x0 for name in ("teacher", "student", "fake_score")]
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2)
    assert not torch.allclose(outputs[1], outputs[2], rtol=1e-2)


def test_a_switch_ends_with_its_block_even_after_an_error(adapters: Roles, teacher: Teacher) -> None:
    batch = inputs(teacher)
    assert adapters.adapters is not None
    before = teacher.denoiser(*batch).x0
    with pytest.raises(ZeroDivisionError), adapters.adapters.use("student"), adapters.adapters.use("fake_score"):
        _ = 1 / 0
    assert adapters.adapters.active is None
    assert torch.equal(teacher.denoiser(*batch).x0, before)


def test_adapters_of_different_targets_live_together(teacher: Teacher) -> None:
    narrow = Role(train="lora", lr=1e-3, rank=2, lora_targets=("to_q",))
    roles = Roles(teacher, {"student": LORA, "fake_score": narrow})
    shake(roles, "student", 1)
    shake(roles, "fake_score", 2)
    batch = inputs(teacher)
    outputs = [roles.denoiser(name)(*batch).x0 for name in ("teacher", "student", "fake_score")]
    assert len(roles.parameters("student")) == 4 * len(roles.parameters("fake_score")) > 0
    assert not torch.allclose(outputs[2], outputs[0])
    for name in ("student", "fake_score"):
        merged = teacher.family.network(roles.merged(name))(*batch)
        torch.testing.assert_close(merged, roles.network(name)(*batch), rtol=1e-5, atol=1e-5)
    roles.close()


def test_the_ledger_counts_samples_and_not_calls(adapters: Roles, teacher: Teacher) -> None:
    x, t, cond = inputs(teacher)
    null = teacher.encode(["", ""])
    adapters.denoiser("student")(x, t, cond)
    adapters.denoiser("teacher").guided(x, t, cond, null, 3.0)
    adapters.denoiser("fake_score").guided(x, t, cond, null, 1.0)
    assert dict(adapters.ledger) == {"student": 2, "teacher": 4, "fake_score": 2}


# --- who trains


def test_train_only_gives_gradient_to_the_named_roles_and_to_nobody_else(teacher: Teacher) -> None:
    roles = Roles(
        teacher,
        {
            "student": Role(train="full", lr=1e-4),
            "fake_score": LORA,
            "critic": LORA,
            "head": Role(train="module", lr=1e-4, build=lambda _: nn.Linear(4, 1)),
        },
    )
    shake(roles, "fake_score", 1)
    shake(roles, "critic", 2)
    x, t, cond = inputs(teacher)

    def loss() -> torch.Tensor:
        sample = roles.denoiser("student")(x, t, cond).x0
        scores = [roles.denoiser(name)(sample, t, cond).x0 for name in ("teacher", "fake_score", "critic")]
        return sum(s.square().mean() for s in scores) + roles.modules["head"](sample.movedim(1, -1)).square().mean()

    every = {name: roles.parameters(name) for name in roles.specs}
    frozen = [p for k, p in teacher.family.backbone.named_parameters() if ".lora_" not in k]
    assert not any(p.requires_grad for p in [*frozen, *sum(every.values(), [])])
    for names in (("student",), ("fake_score",), ("fake_score", "head"), ("critic",)):
        roles.train_only(*names)
        loss().backward()
        for name, parameters in every.items():
            received = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in parameters]
            assert any(received) == (name in names), (names, name)
            assert name in names or all(p.grad is None for p in parameters)
            for p in parameters:
                p.grad = None
        assert all(p.grad is None for p in frozen)
    roles.close()


def test_a_switch_of_role_does_not_lose_gradient(adapters: Roles, teacher: Teacher) -> None:
    """peft's own switch clears requires_grad: a backward after it leaves the student without gradient, silently."""
    x, t, cond = inputs(teacher)
    adapters.train_only("student")
    before = adapters.denoiser("student")(x, t, cond).x0
    adapters.denoiser("teacher")(x, t, cond)
    adapters.denoiser("fake_score")(x, t, cond)
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters("student"))


def adapted(network: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_through_two_roles_equals_separate_copies(teacher: Teacher, checkpointing: bool) -> None:
    """SiD-like: (mu_f(x) - mu_r(x)) . (mu_f(x) - x) of the student's x, whose graph runs through all three roles."""
    teacher.pipeline.unet.to(torch.float64)
    roles = Roles(teacher, {"student": LORA, "fake_score": LORA})
    shake(roles, "student", 1)
    shake(roles, "fake_score", 2)
    x, t, cond = inputs(teacher, torch.float64)
    cond = cond.double()

    def loss(student: object, fake: object, real: object) -> torch.Tensor:
        sample = student(x, t, cond)
        mu_f, mu_r = fake(sample, t, cond), real(sample, t, cond)
        return ((mu_f - mu_r) * (mu_f - sample)).mean()

    roles.train_only("student", "fake_score")
    call, assembled = teacher.family.network, copy.deepcopy(teacher.family.backbone)
    want = {}
    for trained in ("student", "fake_score"):  # the trained role in a copy of its own, the others merged or bare
        networks = {name: call(roles.merged(name)) for name in ("student", "fake_score")}
        own = copy.deepcopy(assembled)
        for layer in adapted(own):
            layer.set_adapter(trained)
            layer.enable_adapters(True)
        networks[trained] = call(own)
        bare = copy.deepcopy(assembled)
        for layer in adapted(bare):
            layer.enable_adapters(False)
        parameters = [p for k, p in own.named_parameters() if f".{trained}." in k]
        value = loss(networks["student"], networks["fake_score"], call(bare))
        want[trained] = flat(list(torch.autograd.grad(value, parameters)))

    forwards = []
    if checkpointing:
        assert roles.adapters is not None
        teacher.family.backbone.enable_gradient_checkpointing(roles.adapters.checkpoint)
    handle = teacher.family.backbone.mid_block.resnets[1].register_forward_pre_hook(lambda *_: forwards.append(1))
    value = loss(roles.network("student"), roles.network("fake_score"), roles.network("teacher"))
    during = len(forwards)
    value.backward()
    handle.remove()
    assert during == 3
    assert (len(forwards) > during) == checkpointing  # something was recomputed
    for name in ("student", "fake_score"):
        got = flat([p.grad for p in roles.parameters(name)])
        assert want[name].norm() > 1e-6
        assert (got - want[name]).norm() < 1e-6 * want[name].norm()
    roles.close()


def test_full_roles_are_copies_of_the_teacher_that_do_not_touch_it(teacher: Teacher) -> None:
    batch, digest = inputs(teacher), teacher.weights_hash()
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-4), "fake_score": LORA})
    assert torch.equal(roles.denoiser("student")(*batch).x0, teacher.denoiser(*batch).x0)
    assert not any("lora" in key for key in roles.modules["student"].state_dict())
    assert len(roles.parameters("student")) == len(list(teacher.pipeline.unet.parameters())) - len(roles.parameters("fake_score"))
    for parameter in roles.parameters("student"):
        parameter.data.zero_()
    assert teacher.weights_hash() == digest
    roles.close()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_trains_is_float32_even_on_a_half_precision_teacher(teacher: Teacher, train: str) -> None:
    """In bfloat16 a step of 1e-5 on a weight of 0.1 rounds to nothing: the student would never move."""
    teacher.pipeline.to(torch.bfloat16)
    roles = Roles(teacher, {"student": LORA if train == "lora" else Role(train="full", lr=1e-5)})
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
    x, t, cond = inputs(teacher)
    roles.train_only("student")
    optimizer = torch.optim.AdamW(roles.parameters("student"), lr=1e-5, weight_decay=0.0)
    before = [p.detach().clone() for p in roles.parameters("student")]
    roles.denoiser("student")(x, t, cond).x0.square().mean().backward()
    optimizer.step()
    pairs = list(zip(roles.parameters("student"), before, strict=True))
    moved = sum(int((p != old).sum()) for p, old in pairs if p.grad is not None)
    trained = sum(int((p.grad != 0).sum()) for p, _ in pairs if p.grad is not None)
    assert moved > 0.9 * trained > 0
    roles.close()


# --- weights in and out


def test_merged_is_a_stock_network_that_computes_the_adapter(adapters: Roles, teacher: Teacher) -> None:
    batch, stock = inputs(teacher), tiny_teacher().family.backbone
    for name in ("student", "fake_score"):
        merged = adapters.merged(name)
        assert list(merged.state_dict()) == list(stock.state_dict())
        got = teacher.family.network(merged)(*batch)
        torch.testing.assert_close(got, adapters.network(name)(*batch), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, adapters.network("teacher")(*batch), rtol=1e-2)
    assert adapters.adapters is not None
    assert adapters.adapters.active is None  # merging a copy leaves the original as it was


def test_merged_full_role_is_a_copy(teacher: Teacher) -> None:
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-4)})
    merged = roles.merged("student")
    first = next(merged.parameters())
    assert torch.equal(first, roles.parameters("student")[0])
    assert first.data_ptr() != roles.parameters("student")[0].data_ptr()


def test_close_gives_the_teacher_back_and_it_can_be_used_again(teacher: Teacher) -> None:
    batch, digest = inputs(teacher), teacher.weights_hash()
    keys, before = list(teacher.pipeline.unet.state_dict()), teacher.denoiser(*batch).x0
    for _ in range(2):
        roles = Roles(teacher, {"student": LORA, "fake_score": LORA})
        shake(roles, "student", 1)
        assert list(teacher.pipeline.unet.state_dict()) != keys
        roles.close()
        roles.close()  # a second close does nothing
        assert list(teacher.pipeline.unet.state_dict()) == keys
        assert teacher.weights_hash() == digest
        assert torch.equal(teacher.denoiser(*batch).x0, before)
        assert not any(p.requires_grad for p in teacher.pipeline.unet.parameters())


def test_a_closed_adapter_role_does_not_silently_become_the_teacher(teacher: Teacher) -> None:
    roles = Roles(teacher, {"fake_score": LORA})
    shake(roles, "fake_score", 1)
    earlier = roles.denoiser("fake_score")
    roles.close()
    with pytest.raises((RuntimeError, ValueError)):
        roles.denoiser("fake_score")(*inputs(teacher))
    with pytest.raises((RuntimeError, ValueError)):
        earlier(*inputs(teacher))


def test_weights_hash_sees_the_backbone_and_not_its_adapters(teacher: Teacher) -> None:
    digest = teacher.weights_hash()
    roles = Roles(teacher, {"fake_score": LORA})
    shake(roles, "fake_score", 1)
    assert teacher.weights_hash() == digest
    assert tiny_teacher().weights_hash() == digest
    assert tiny_teacher(seed=1).weights_hash() != digest
    roles.close()
    teacher.pipeline.unet.conv_out.bias.data[0] += 1e-3
    assert teacher.weights_hash() != digest


@pytest.mark.parametrize("train", ["lora", "full"])
def test_state_and_load_round_trip_to_the_bit(teacher: Teacher, train: str) -> None:
    spec = {"fake_score": LORA if train == "lora" else Role(train="full", lr=1e-4)}
    roles = Roles(teacher, spec)
    shake(roles, "fake_score", 1)
    batch = inputs(teacher)
    want, saved = roles.denoiser("fake_score")(*batch).x0, {k: v.clone() for k, v in roles.state("fake_score").items()}
    shake(roles, "fake_score", 2)
    assert not torch.equal(roles.denoiser("fake_score")(*batch).x0, want)
    roles.load("fake_score", saved)
    assert torch.equal(roles.denoiser("fake_score")(*batch).x0, want)
    key = next(iter(saved))
    for wrong in ({k: v for k, v in saved.items() if k != key}, {**saved, "surplus": saved[key]}):
        with pytest.raises(KeyError, match="fake_score"):
            roles.load("fake_score", wrong)
    roles.close()


def test_the_private_attributes_of_peft_are_where_roles_sets_them(adapters: Roles) -> None:
    """`_active_adapter` and `_disable_adapters` are peft's own: a rename there would make every switch a no-op."""
    assert adapters.adapters is not None
    with adapters.adapters.use("student"):
        for layer in adapters.adapters.layers:
            assert layer.active_adapters == ["student"]
            assert not layer.disable_adapters
    for layer in adapters.adapters.layers:
        assert layer.disable_adapters
    assert adapters.adapters.layers


def test_adapters_leave_nothing_behind_and_peft_has_nothing_to_say(teacher: Teacher) -> None:
    before = set(vars(teacher.family.backbone))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            Roles(teacher, {"student": LORA, "fake_score": LORA}).close()
    assert set(vars(teacher.family.backbone)) == before


def test_an_output_and_its_graph_are_gone_after_the_backward_pass(teacher: Teacher) -> None:
    """The count of backwards hangs on the output: a hook that held it would keep the graph of every iteration for good."""
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3)})
    roles.train_only("student")
    x, t, cond = inputs(teacher)
    output = roles.denoiser("student").network(x, t, cond)
    gone = weakref.ref(output)
    output.sum().backward()
    del output
    gc.collect()
    assert gone() is None
    assert roles.backwards["student"] == len(x)


def test_a_generator_takes_inputs_of_its_own_and_its_samples_are_counted() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.arange(6.0).view(3, 2))

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.rows[index]

    roles = Roles(tiny_teacher(), {"student": Role(train="module", lr=1.0, build=lambda teacher: Table())})
    roles.train_only("student")
    out = roles.generate("student", torch.tensor([2, 0, 2, 1]))
    assert out[0].tolist() == [4.0, 5.0]
    out.sum().backward()
    assert (roles.ledger["student"], roles.backwards["student"]) == (4, 4)
    assert roles.parameters("student")[0].grad[:, 0].tolist() == [1.0, 1.0, 2.0]


def test_the_embedded_time_of_a_unet_has_the_width_that_the_family_says() -> None:
    teacher = tiny_teacher()
    layer, width = teacher.family.time_embedding(teacher.family.backbone)
    seen: list[torch.Size] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    teacher.denoiser(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), teacher.encode(["a", "b", "c"]))
    handle.remove()
    assert seen == [(3, width)]


# --- averages


def test_an_average_follows_its_leader_and_nothing_trains_it(teacher: Teacher) -> None:
    """An average that an optimiser also steps would drift from what it is the average of."""
    roles = Roles(teacher, {"student": Role(train="full", lr=1e-3), "target": Role(train="average")})
    assert [role.learns for role in roles.specs.values()] == [True, False]
    shake(roles, "student", 1)
    start = [p.clone() for p in roles.parameters("target")]
    leader = [p.clone() for p in roles.parameters("student")]
    roles.follow("target", "student", 0.75)
    for old, ahead, now in zip(start, leader, roles.parameters("target"), strict=True):
        assert torch.allclose(now, 0.75 * old + 0.25 * ahead, atol=1e-7)
    roles.train_only("student")
    assert not any(p.requires_grad for p in roles.parameters("target"))
    roles.follow("target", "student", 0.0)
    batch = inputs(teacher)
    assert torch.equal(roles.denoiser("target")(*batch).x0, roles.denoiser("student")(*batch).x0)


def test_an_adapter_that_follows_another_has_its_factors_averaged_and_is_trained_by_nothing(teacher: Teacher) -> None:
    lora = {"rank": 2, "lora_alpha": 2.0}
    roles = Roles(teacher, {"student": Role(train="lora", lr=1e-3, **lora), "target": Role(train="lora-average", **lora)})
    assert [(role.learns, role.adapts) for role in roles.specs.values()] == [(True, True), (False, True)]
    shake(roles, "student", 1)
    roles.follow("target", "student", 0.0)
    batch = inputs(teacher)
    assert torch.equal(roles.denoiser("target")(*batch).x0, roles.denoiser("student")(*batch).x0)
    assert not torch.equal(roles.denoiser("target")(*batch).x0, roles.denoiser("teacher")(*batch).x0)
    start = [p.clone() for p in roles.parameters("target")]
    shake(roles, "student", 2)
    roles.follow("target", "student", 0.75)
    for old, ahead, now in zip(start, roles.parameters("student"), roles.parameters("target"), strict=True):
        assert torch.allclose(now, 0.75 * old + 0.25 * ahead, atol=1e-7)
    roles.train_only("student")
    assert not any(p.requires_grad for p in roles.parameters("target"))
    roles.close()


def test_an_average_of_a_student_with_a_network_of_its_own_is_of_that_network(teacher: Teacher) -> None:
    """A copy of the teacher in its place has other weights, and could not follow."""
    smaller = nn.Linear(3, 2)
    roles = Roles(teacher, {"student": Role(train="full"), "target": Role(train="average")}, Start(network=smaller))
    shake(roles, "student", 1)
    roles.follow("target", "student", 0.5)
    for start, ahead, now in zip(smaller.parameters(), roles.parameters("student"), roles.parameters("target"), strict=True):
        assert torch.allclose(now, (start + ahead) / 2, atol=1e-7)


def test_an_adapter_s_weights_are_copies_by_the_names_of_its_layers(adapters: Roles) -> None:
    weights = adapters.adapter("student")
    layers = {key.rsplit(".lora_", 1)[0] for key in weights}
    network = dict(adapters.teacher.family.backbone.named_modules())
    assert weights.keys() == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    for layer in layers:
        assert torch.equal(weights[f"{layer}.lora_A.weight"], network[layer].lora_A["student"].weight)
        assert torch.equal(weights[f"{layer}.lora_B.weight"], network[layer].lora_B["student"].weight)
    shake(adapters, "student", 3)
    assert not torch.equal(weights[f"{layer}.lora_A.weight"], network[layer].lora_A["student"].weight)
    assert Roles(tiny_teacher(), {"student": Role(train="full")}).adapter("student") == {}


def test_a_state_has_nothing_to_train_and_is_in_checkpoints() -> None:
    """No optimiser, no average, no gradient; its buffers come back."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.ones(()))

    specs = {"student": Role(train="full", lr=1e-3), "memory": Role(train="state", build=lambda teacher: Memory())}
    roles, again = Roles(tiny_teacher(), specs), Roles(tiny_teacher(), specs)
    assert not specs["memory"].learns
    assert roles.parameters("memory") == []
    roles.modules["memory"].value.fill_(3.0)
    again.load("memory", roles.state("memory"))
    assert again.modules["memory"].value == 3
    roles.train_only("memory")
    assert not any(p.requires_grad for p in roles.parameters("student"))
