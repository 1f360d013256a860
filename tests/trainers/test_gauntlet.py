"""What every method must keep to by merely existing; its own test file lists the ``VARIANTS`` that run here.

Who receives gradient, what is run and kept, equal trajectories (accumulation, resume, ranks), precision, export, backbones.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from short_runs import (
    METHODS,
    as_rank,
    distance,
    first_steps,
    gradients,
    join_ranks,
    listening,
    run_to,
    running,
    shake,
    started,
    tensors_of,
    trainer,
    updates_of,
    variants,
    variants_of,
)
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor

import fastdiff.pipelines.export as export
from fastdiff import Trainer
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.scenes import load_scenes
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Exported, verify_exports
from fastdiff.proof import laws
from fastdiff.proof.certify import METRICS
from fastdiff.trainers._jumps import JumpMethod
from fastdiff.trainers.method import Batch, Calls, Method

VARIANTS = variants()
GUIDED = {
    name: variant
    for name, variant in VARIANTS.items()
    if hasattr(variant, "guidance_scale")
    and not getattr(variant, "guidance_choices", ())  # the teacher's scales are those, whatever the student samples at
    and any(variant.calls(variant.updates(step)).get("teacher", Calls(0, 0)).forward for step in first_steps(variant))
}
each_method = pytest.mark.parametrize("kind", METHODS, ids=[kind.name() for kind in METHODS])


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def method(request: pytest.FixtureRequest) -> Method:
    return dataclasses.replace(request.param)


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks and noise in float64: in float32 the difference of two guided scores keeps only four or five digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_method
def test_a_method_lists_its_variants(kind: type[Method]) -> None:
    listed = variants_of(kind)
    assert listed, (
        f"tests/trainers/test_{kind.__module__.rsplit('.', 1)[1]}.py has no VARIANTS: nothing here would run {kind.name()}"
    )
    assert {type(variant) for variant in listed.values()} == {kind}


# --- who receives gradient


def test_an_update_gives_gradient_to_its_roles_and_to_nothing_else(method: Method, tmp_path: Path) -> None:
    with started(method, tmp_path) as run:
        shake(run)
        teacher_before = run.teacher.weights_hash()
        for update, trained, _ in updates_of(run):
            for name in run._optimizers:
                found = [p.grad for p in run._roles.parameters(name)]
                if name in trained:
                    assert all(g is not None for g in found), f"{update} left out weights of {name}"
                    assert any(g.abs().max() > 0 for g in found), f"the gradient of {name} is zero in {update}"
                else:
                    assert all(g is None for g in found), f"{update} leaked gradient into {name}"
            own = [p for n, p in run.teacher.family.backbone.named_parameters() if ".lora_" not in n]
            assert all(p.grad is None and not p.requires_grad for p in own)
    assert run.teacher.weights_hash() == teacher_before


def test_an_iteration_changes_what_it_trains_and_nothing_else(method: Method, tmp_path: Path) -> None:
    with started(method, tmp_path, warmup_steps=0) as run:
        shake(run)
        teacher_before = run.teacher.weights_hash()
        for step in first_steps(method):
            before = {n: {k: v.clone() for k, v in run._roles.state(n).items()} for n in run._optimizers}
            trained = {name for update in method.updates(step) for name in method.trains(update)}
            run._step = step
            run.advance()
            changed = {n for n, old in before.items() if any(not torch.equal(v, run._roles.state(n)[k]) for k, v in old.items())}
            assert changed == trained, f"step {step}"
    assert run.teacher.weights_hash() == teacher_before


# --- what is run, and what is kept for it


def ledger(run: Trainer) -> dict[str, Calls]:
    counted = run._roles.ledger.keys() | run._roles.backwards.keys()
    return {name: Calls(run._roles.ledger[name], run._roles.backwards[name]) for name in counted}


def declared(method: Method, step: int, samples: int = 4) -> dict[str, Calls]:
    calls = method.calls(method.updates(step)).items()
    return {name: Calls(c.forward * samples, c.backward * samples) for name, c in calls if c != Calls(0, 0)}


def test_an_iteration_runs_what_the_method_declares(method: Method, tmp_path: Path) -> None:
    """Counted twice: by the roles, and at the networks themselves, which also see a call that goes past the roles."""
    with started(method, tmp_path) as run:
        shake(run)
        roles = run._roles
        asked = ["teacher", *(name for name, role in method.roles().items() if role.train != "module")]
        went: Counter[int] = Counter()
        for network in {id(roles.backbone(name)): roles.backbone(name) for name in asked}.values():
            network.register_forward_pre_hook(lambda module, inputs: went.update({id(module): len(inputs[0])}))
        for step in first_steps(method):
            for counts in (roles.ledger, roles.backwards, went):
                counts.clear()
            run._iteration(step)
            assert ledger(run) == declared(method, step), f"step {step}, {method.updates(step)}"
            told: Counter[int] = Counter()
            for name in asked:
                told[id(roles.backbone(name))] += roles.ledger[name]
            assert +told == went, f"step {step} asks a network behind the ledger's back"


@pytest.mark.parametrize("guided", GUIDED.values(), ids=GUIDED.keys())
def test_nobody_asks_the_teacher_about_the_null_prompt_at_guidance_one(guided: Method, tmp_path: Path) -> None:
    """FastVideo runs the unconditional pass and multiplies its result by zero."""
    method = dataclasses.replace(guided, guidance_scale=1.0)  # type: ignore[call-arg]
    with started(method, tmp_path) as run, listening(run) as calls:
        for step in first_steps(method):
            run._roles.ledger.clear()
            run._roles.backwards.clear()
            run._iteration(step)
            assert ledger(run) == declared(method, step)
        null = run.teacher.null[0]
        asked = [row for call in calls if call.role == "teacher" for row in call.cond]
        assert bool(asked) == any("teacher" in declared(method, step) for step in first_steps(method))
        assert not any(torch.equal(row, null) for row in asked)


def test_what_a_forward_pass_keeps_is_used_by_a_backward_pass(method: Method, tmp_path: Path) -> None:
    """A graph through the teacher that no gradient comes back through doubles the memory and shows nowhere else (FastGen)."""
    with started(method, tmp_path) as run, listening(run) as calls:
        shake(run)
        for update, trained, _ in updates_of(run):
            waste = Counter({call.role: sum(call.kept.values()) for call in calls if call.kept})
            assert not waste, f"{update} keeps bytes for nothing: {dict(waste)}"
            assert not trained or {call.role for call in calls} & set(trained), update
            calls.clear()


def leaves(cond: Any) -> list[Tensor]:
    return [leaf for value in cond.values() for leaf in leaves(value)] if isinstance(cond, dict) else [cond]


def test_times_are_those_that_the_method_declares_and_the_process_has(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time out of range has an embedding too (diffusers' SANA-Sprint script asks at a probability)."""
    drawn: dict[str, tuple[int, int, bool]] = {}
    original = Batch.times

    def times(self: Batch, name: str, low: int | Tensor, high: int | Tensor) -> Tensor:
        ends = int(torch.as_tensor(low).min()), int(torch.as_tensor(high).max())
        drawn[name] = (*ends, isinstance(low, Tensor) or isinstance(high, Tensor))
        return original(self, name, low, high)

    monkeypatch.setattr(Batch, "times", times)
    with started(method, tmp_path) as run, listening(run) as calls:
        for _ in updates_of(run):
            pass
        ranges = method.noise_range(run.teacher)
        assert drawn.keys() == ranges.keys()
        for name, (low, high, by_sample) in drawn.items():
            first, last = ranges[name]
            assert first <= low <= high <= last, name
            assert by_sample or (first, last) == (low, high), name
        process = run.teacher.process
        first, last = (process.network_time(torch.tensor(int(t))) for t in (process.t_min, process.t_max))
        timed = [call for call in calls if call.t is not None]
        assert timed
        for call in timed:
            assert call.t.shape == call.x_t.shape[:1]
            assert all(value.shape[:1] == call.t.shape for value in leaves(call.cond))
            assert ((call.t >= first) & (call.t <= last)).all()


# --- equal trajectories


@pytest.mark.usefixtures("float64")
def test_accumulation_4x1_gives_the_gradient_of_1x4(method: Method, tmp_path: Path) -> None:
    found = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        with started(method, tmp_path / f"{batch_size}", batch_size=batch_size, accumulation=accumulation) as run:
            shake(run)
            found.append(gradients(run))
    whole, parts = found
    assert whole.keys() == parts.keys()
    for key, gradient in whole.items():
        assert distance(parts[key], gradient) <= 1e-6, key


def awkward_step(method: Method) -> int:
    """The last of the first steps at which an iteration makes other updates than the one before; else the third."""
    return max((step for step in range(1, 5) if method.updates(step) != method.updates(step - 1)), default=2)


def test_a_run_resumed_at_an_awkward_step_equals_the_straight_one_to_the_bit(method: Method, tmp_path: Path) -> None:
    """In the middle of a cycle, or where the warm start ends and the other optimisers have no state yet."""
    cut = awkward_step(method)
    assert method.updates(cut) != method.updates(cut - 1) or len(first_steps(method)) == 1
    with started(method, tmp_path / "straight") as run:
        for _ in range(cut):
            run.advance()
        run._save()
        shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
        for _ in range(2):
            run.advance()
        run._save()
    run_to(dataclasses.replace(method), tmp_path / "resumed", cut + 2, resume=True)
    straight, resumed = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    for name, values in straight.items():
        assert values.keys() == resumed[name].keys()
        for key, value in values.items():
            assert torch.equal(value, resumed[name][key]), f"{name} {key}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every variant."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(as_rank, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_give_the_gradient_of_one_on_the_same_batch(name: str, two_ranks: Path, tmp_path: Path) -> None:
    with started(dataclasses.replace(VARIANTS[name]), tmp_path) as run:
        shake(run)
        join_ranks(run, 2)
        alone = gradients(run)
    first, second = (torch.load(two_ranks / name / f"rank-{index}.pt", weights_only=True) for index in range(2))
    assert torch.equal(first["weights"], second["weights"])
    shared = (first["inputs"].flatten(1)[:, None] == second["inputs"].flatten(1)[None]).all(2)
    assert not shared.any(), "a sample went through networks on both ranks"
    assert first["gradients"].keys() == second["gradients"].keys() == alone.keys()
    for key, gradient in alone.items():
        assert torch.equal(first["gradients"][key].nan_to_num(), second["gradients"][key].nan_to_num())
        assert distance(first["gradients"][key], gradient) <= 1e-5, key


# --- precision


@pytest.fixture
def precisions() -> Iterator[Callable[[], None]]:
    """Accelerate allows one precision a process: call before each."""
    AcceleratorState._reset_state()
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


def test_bf16_autocast_stays_near_float32(method: Method, tmp_path: Path, precisions: Callable[[], None]) -> None:
    """Terms and gradients; a weight that has a gradient in one precision only is infinitely far."""
    terms: dict[str, dict[str, Tensor]] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for precision in ("no", "bf16"):
        precisions()
        with started(dataclasses.replace(method), tmp_path / precision, mixed_precision=precision) as run:
            shake(run)
            terms[precision] = {f"{key} {name}": v for key, _, values in updates_of(run) for name, v in values.items()}
            found[precision] = gradients(run)
    of_terms, of_gradients = method.bf16_tolerance
    assert terms["bf16"].keys() == terms["no"].keys()
    for key, exact in terms["no"].items():
        assert terms["bf16"][key].dtype == torch.float32
        assert abs(terms["bf16"][key] - exact) <= of_terms * abs(exact), key
    for update in {key.rsplit(" ", 1)[0] for key in terms["no"]}:  # a term of a renderer alone, kept out of autocast, is the same
        assert any(terms["bf16"][key] != exact for key, exact in terms["no"].items() if key.startswith(update)), update
    for key, gradient in found["no"].items():
        assert 0 < distance(found["bf16"][key], gradient) <= of_gradients, key


# --- export


PIPELINES = [kind for kind in METHODS if kind.delivers == "pipeline"]
SCENES = [kind for kind in METHODS if kind.delivers == "scenes"]


def test_the_exported_folders_repeat_their_students_in_plain_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a bare call where a stock class can be called bare; one process without fastdiff reads all folders."""
    from diffusers import DiffusionPipeline

    exported: dict[str, Exported] = {}

    def kept(folder: Path, *given: Any) -> float:
        exported[folder.name] = Exported(folder, *given)
        return 0.0

    monkeypatch.setattr(export, "verify_export", kept)
    for kind in PIPELINES:
        run = trainer(dataclasses.replace(next(iter(variants_of(kind).values()))), tmp_path / kind.name(), max_steps=2)
        run.train()
        pipeline = DiffusionPipeline.from_pretrained(run.folder, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        calls: list[int] = []
        pipeline.unet.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(inputs[0])))
        told = (
            run.method.schedule(run.teacher).call if run.method.sampler == "tcd" else {}
        )  # no stock class takes such steps unasked
        pipeline("a red boot on a white background", **told)
        assert calls == [1] * len(run.method.levels()), kind.name()
    differences = dict(zip(exported, verify_exports(list(exported.values())), strict=True))
    assert differences.keys() == {kind.name() for kind in PIPELINES}
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("kind", SCENES, ids=[kind.name() for kind in SCENES])
def test_the_delivered_scenes_show_what_the_trained_ones_showed(kind: type[Method], tmp_path: Path) -> None:
    for key, variant in variants_of(kind).items():
        run = trainer(dataclasses.replace(variant), tmp_path / key, max_steps=2)
        trained = run.train()
        assert run.result["export_max_abs_diff"] == 0
        read = load_scenes(tmp_path / key)
        assert read.state_dict().keys() == trained.state_dict().keys()
        assert all(torch.equal(value, read.state_dict()[name]) for name, value in trained.state_dict().items())
        assert (tmp_path / key / "turntable.gif").exists() == bool(read.geometry)


# --- fields


@each_method
def test_every_field_of_a_method_is_read(kind: type[Method], tmp_path: Path) -> None:
    """By what is run, not by the checks of a constructor; SimpleTuner declares two options that nothing reads."""
    read: set[str] = set()

    class Spy(kind):  # type: ignore[misc,valid-type]
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    unread = {field.name for field in dataclasses.fields(kind)}
    for key, variant in variants_of(kind).items():
        run = trainer(Spy(**dataclasses.asdict(variant)), tmp_path / key)
        read.clear()
        with running(run):
            for step in first_steps(variant):
                run._iteration(step)
            run.method.schedule(run.teacher)  # what sampling asks for
        unread -= read
        if not unread:
            break
    assert not unread


@each_method
def test_an_unknown_field_is_refused(kind: type[Method]) -> None:
    """FastVideo drops it with a warning."""
    with pytest.raises(TypeError, match="unheard_of"):
        kind(unheard_of=1)


# --- backbones


HIDDEN = ("hidden", 128)


def _law() -> Teacher:
    law = GaussianMixture.ring(laws.process())
    return Teacher.from_module(TimeMLP(2), law.process, "v_prediction", shape=(2,), law=law, bottleneck=HIDDEN)


def _module() -> Teacher:
    return _under(laws.process(), "epsilon")()


def _under(process: NoiseProcess, prediction_type: str) -> Callable[[], Teacher]:
    options = {"shape": (3,), "prompts": ["0", "1", "2"], "bottleneck": HIDDEN}
    return lambda: Teacher.from_module(TimeMLP(3, classes=3), process, prediction_type, **options)


BACKBONES: dict[str, Callable[[], Teacher]] = {
    "unet-epsilon": tiny_teacher,
    "unet-v": lambda: tiny_teacher(prediction_type="v_prediction"),
    "sana": tiny_flow_teacher,
    "law": _law,
    "module": _module,
    "flow": _under(RectifiedFlow(), "flow_prediction"),
    "edm": _under(EDM(), "edm"),
    "trigflow": _under(TrigFlow(), "trigflow"),
}


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES.keys())
def teacher(request: pytest.FixtureRequest) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param()


def refusal(method: Method, teacher: Teacher, folder: Path) -> UserError | None:
    try:
        trainer(method, folder, teacher)
    except UserError as error:
        return error
    return None


def test_a_backbone_is_refused_before_the_training_or_has_finite_losses(method: Method, teacher: Teacher, tmp_path: Path) -> None:
    error = refusal(method, teacher, tmp_path)
    if error is not None:
        assert teacher.name in str(error)
        return
    with started(method, tmp_path, teacher) as run:
        shake(run)
        for update, trained, terms in updates_of(run):
            assert all(torch.isfinite(value) and value != 0 for value in terms.values()), f"{update} {terms}"
            for p in (p for name in trained for p in run._roles.parameters(name)):
                assert torch.isfinite(p.grad).all(), update
        expected: dict[str, Calls] = {}
        for name, calls in ((name, calls) for step in first_steps(method) for name, calls in declared(method, step).items()):
            expected[name] = expected.get(name, Calls(0, 0)) + calls
        assert ledger(run) == expected


@each_method
def test_a_backbone_is_refused_by_settings_and_not_by_a_method(kind: type[Method], teacher: Teacher, tmp_path: Path) -> None:
    """But for a network that no stock pipeline could tell how far to jump."""
    if issubclass(kind, JumpMethod) and teacher.pipeline is not None and isinstance(teacher.process, RectifiedFlow):
        assert all("how far to jump" in str(refusal(variant, teacher, tmp_path)) for variant in variants_of(kind).values())
        return
    assert any(refusal(variant, teacher, tmp_path) is None for variant in variants_of(kind).values())


# --- certificates


@each_method
def test_a_method_is_proved_on_a_law(kind: type[Method]) -> None:
    assert kind.trials, f"{kind.name()} has no trials: nothing says that it recovers any law"
    for name, trial in kind.trials.items():
        assert (trial.law or name) in laws.LAWS
        assert trial.bounds
        assert set(trial.bounds) <= METRICS.keys()
        assert getattr(kind(**trial.fields), "guidance_scale", 1.0) == 1.0, "a guided score is no law's"
