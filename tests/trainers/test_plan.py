"""The plan against the run: bytes, calls, times and activations of a real ``Trainer``."""

import copy
import dataclasses
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tiny import BETAS, tiny_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from fastdiff import Trainer
from fastdiff.data.fashion import captions
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import DMD2, TDM, ODEPairs, SwiftBrush
from fastdiff.trainers._activations import kept_for_backward, resident
from fastdiff.trainers._counts import cycle
from fastdiff.trainers._plan import Plan, plan
from fastdiff.trainers.config import Config
from fastdiff.trainers.method import Calls, Method, due

PAIRS = {"pairs": 5, "pair_steps": 2}
METHODS = {
    "ode-pairs": ODEPairs(**PAIRS),
    "swiftbrush": SwiftBrush(warm_start_steps=1, **PAIRS),
    "dmd2-full-gan": DMD2(gan_weight=1e-3, ratio=(1, 2), **PAIRS),
    "dmd2-lora-gan": DMD2(fake_score="lora", gan_weight=1e-3, ratio=(1, 2), **PAIRS),
}
PROMPTS = captions()[:8]
OPTIONS = {"max_steps": 12, "batch_size": 1, "validate_every": 0}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def planned(method: Method, folder: Path, **options: object) -> Plan:
    config = Config(output_dir=folder / "other", **{**OPTIONS, **options})
    return plan(method, Teacher.planned("fashion"), config, prompts=PROMPTS)


@pytest.fixture(scope="module", params=METHODS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterable[tuple[Plan, Trainer]]:
    """A plan, and the started run that it speaks of."""
    folder = tmp_path_factory.mktemp("plan")
    method = METHODS[request.param]
    run = Trainer(copy.copy(method), Teacher.from_pretrained("fashion"), prompts=PROMPTS, output_dir=folder / "run", **OPTIONS)
    run.start()
    yield planned(method, folder), run
    run.close()


def test_bytes_are_those_of_the_run(both: tuple[Plan, Trainer]) -> None:
    plan, run = both
    while run._step < 2 and not all(o.optimizer.state for o in run._optimizers.values()):
        run.advance()
    backbone = run.teacher.family.backbone
    weights = size([*(p for name, p in backbone.named_parameters() if ".lora_" not in name), *backbone.buffers()])
    weights += sum(size(run._roles.state(name).values()) for name in run._optimizers)
    states = sum(size(s.values()) for o in run._optimizers.values() for s in o.optimizer.state.values())
    gradients = dict.fromkeys(run._optimizers, 0)
    micro = run._micro_batches(run._step)
    for update in max((run.method.updates(step) for step in range(run._step, 12)), key=len):
        trained = run.method.trains(update)
        run._backward(update, micro, trained)
        found = {n: size(p.grad for p in run._roles.parameters(n) if p.grad is not None) for n in trained}
        assert plan.updates[update].gradients == sum(found.values())
        gradients |= found
        for optimizer in run._optimizers.values():
            optimizer.zero_grad()
    roles = plan.roles.values()
    assert sum(role.weights for role in roles) == weights
    assert sum(role.optimizer for role in roles) == states
    assert sum(role.ema for role in roles) == size(run._ema.shadow_params)
    measured = weights + sum(gradients.values()) + states + size(run._ema.shadow_params)
    assert sum(role.per_gpu for role in roles) == pytest.approx(measured, rel=0.03)
    assert plan.parts["prompt table"].bytes == run.prompts.nbytes > 0
    stored = getattr(run.method, "_pairs", None)
    if stored is not None:
        assert plan.parts["ODE pairs"].bytes == size([stored.noise, stored.x0, stored.prompt])


def test_activations_are_what_autograd_keeps_in_the_run(both: tuple[Plan, Trainer]) -> None:
    plan, run = both
    assert plan.unknown == []
    for step in range(2):
        batch = run._micro_batches(step)[0]
        for update in run.method.updates(step):
            run._roles.train_only(*run.method.trains(update))
            kept = kept_for_backward(lambda u=update, b=batch: run.method.loss(u, b, run._roles), ignore=resident(run._roles))  # type: ignore[misc]
            assert kept == pytest.approx(plan.updates[update].activations, rel=0.03), update


def test_calls_of_warm_start_and_cycle_are_the_ledger_of_the_run(both: tuple[Plan, Trainer]) -> None:
    plan, run = both
    first, samples = 0, len(run._micro_batches(0)) * run.config.batch_size
    for stretch in (plan.warm_start, plan.cycle):
        run._roles.ledger.clear()
        run._roles.backwards.clear()
        for step in range(first, first + stretch.iterations):
            run._iteration(step)
        first += stretch.iterations
        for ledger, kind in ((run._roles.ledger, "forward"), (run._roles.backwards, "backward")):
            expected = {name: getattr(calls, kind) * samples for name, calls in stretch.calls.items()}
            assert +Counter(ledger) == +Counter(expected)
    counted: Counter[str] = Counter()
    for kind in (run.method.updates(step) for step in range(run.config.max_steps)):
        counted.update({name: calls.forward * samples for name, calls in run.method.calls(kind).items()})
    assert {name: calls.forward for name, calls in plan.samples.items()} == dict(counted)


def test_losses_draw_the_declared_times_and_call_the_student_at_the_declared_steps(
    both: tuple[Plan, Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.trainers.method import Batch

    plan, run = both
    drawn: dict[str, tuple[int, int]] = {}
    students: set[int] = set()
    times = Batch.times

    def watched(self: Batch, name: str, low: int, high: int) -> Tensor:
        drawn[name] = (low, high)
        return times(self, name, low, high)

    monkeypatch.setattr(Batch, "times", watched)
    module = run._roles.modules["student"]
    handle = module.register_forward_pre_hook(lambda _, inputs: students.update(inputs[1].tolist()))
    for step in range(2):
        run._iteration(step)
    run._preview()
    handle.remove()
    assert drawn == plan.noise_range
    assert sorted(students) == plan.timesteps


def test_pairs_cost_the_declared_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = ODEPairs(**PAIRS), Counter[str]()
    run = Trainer(copy.copy(method), Teacher.from_pretrained("fashion"), prompts=PROMPTS, output_dir=tmp_path / "run", **OPTIONS)
    run.teacher.family.backbone.register_forward_hook(lambda _, inputs, __: seen.update(teacher=len(inputs[0])))
    run.start()
    run.close()
    assert planned(method, tmp_path).prepares == {"teacher": Calls(seen["teacher"], 0)}


def test_the_exported_scheduler_is_the_one_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.pipelines.export.verify_export", lambda *_: 0.0)
    run = Trainer(
        ODEPairs(**PAIRS),
        Teacher.from_pretrained("fashion"),
        prompts=PROMPTS,
        output_dir=tmp_path / "run",
        **{**OPTIONS, "max_steps": 1},
    )
    scheduler = run.train().scheduler
    scheduler.set_timesteps(1)
    export = planned(ODEPairs(**PAIRS), tmp_path).export
    assert export["class"] == type(scheduler).__name__
    assert export["timesteps"] == scheduler.timesteps.tolist()
    assert export["call"] == {}
    assert json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == export["class"]


def test_accumulation_and_average_cost_what_they_cost(tmp_path: Path) -> None:
    method = ODEPairs(**PAIRS)
    once, more = planned(method, tmp_path, accumulation=1), planned(method, tmp_path, accumulation=3, ema_decay=0.0)
    assert more.peak == once.peak - once.roles["student"].weights
    assert more.samples["student"].forward == 3 * once.samples["student"].forward


def test_fsdp2_divides_networks_and_ddp_divides_nothing(tmp_path: Path) -> None:
    method, teacher, config = METHODS["dmd2-lora-gan"], Teacher.planned("fashion"), Config(output_dir=tmp_path, **OPTIONS)
    one = plan(method, teacher, config, prompts=PROMPTS)
    ddp = plan(method, teacher, config, prompts=PROMPTS, gpus=4, sharding="ddp")
    fsdp = plan(method, teacher, config, prompts=PROMPTS, gpus=4, sharding="fsdp2")
    for name, role in one.roles.items():
        assert ddp.roles[name].per_gpu == role.per_gpu
        assert fsdp.roles[name].per_gpu == pytest.approx(role.per_gpu / (1 if name == "discriminator" else 4), rel=1e-4)
    assert ddp.resident == one.resident
    assert ddp.updates["student"].exchange == 2 * one.updates["student"].gradients
    assert fsdp.updates["student"].gradients == pytest.approx(one.updates["student"].gradients / 4, rel=1e-4)
    assert fsdp.samples["student"].forward == 4 * one.samples["student"].forward
    assert ddp.parts["ODE pairs"].bytes == pytest.approx(one.parts["ODE pairs"].bytes * 2 / 5)


def test_a_loss_that_asks_for_values_leaves_its_activations_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ODEPairs, "loss", lambda self, update, batch, roles: {"term": batch.noise("z").sum().item()})
    found = planned(ODEPairs(**PAIRS), tmp_path)
    assert found.updates["regression"].activations is None
    assert len(found.unknown) == 1
    assert found.refusals == []


def test_a_teacher_with_values_is_refused_and_the_method_is_left_alone(tmp_path: Path) -> None:
    method = ODEPairs(**PAIRS)
    with pytest.raises(ValueError, match=r"Teacher\.planned"):
        plan(method, Teacher.from_pretrained("fashion"), Config(output_dir=tmp_path))
    planned(method, tmp_path)
    assert not hasattr(method, "_pairs")


@pytest.mark.parametrize("ratio", [(1, 1), (1, 5), (2, 5), (3, 7), (4, 4)])
@pytest.mark.parametrize("warm", [0, 1, 40])
def test_the_cycle_is_found_behind_any_warm_start(ratio: tuple[int, int], warm: int) -> None:
    run = ["w"] * warm + [str(due(step, ratio)) for step in range(200)]
    assert cycle(run) == (warm, 1 if ratio == (4, 4) else ratio[1])


def test_the_cycle_of_what_never_repeats_is_all_of_it() -> None:
    assert cycle("abc") == (0, 3)
    assert cycle("a") == (0, 1)


def test_a_half_precision_folder_is_planned_in_the_dtypes_it_loads_in(tmp_path: Path) -> None:
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "half")
    (config := tmp_path / "half" / "text_encoder" / "config.json").write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"})
    )
    blank, real = Teacher.planned(tmp_path / "half"), Teacher.from_pretrained(tmp_path / "half")
    for one, other in zip(blank.family.networks(), real.family.networks(), strict=True):
        assert type(one) is type(other)
        assert {k: (v.shape, v.dtype) for k, v in one.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in other.state_dict().items()
        }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sizes of Stable Diffusion 1.5 without a single weight."""
    return weightless(tmp_path_factory, (320, 640, 1280, 1280))


def weightless(tmp_path_factory: pytest.TempPathFactory, channels: tuple[int, ...]) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tiny_pipeline().save_pretrained(folder)
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=channels),
            "vae": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **vae),
        }
    for name, network in networks.items():
        shutil.rmtree(folder / name)
        network.save_config(folder / name)
    shutil.rmtree(folder / "text_encoder")
    text.save_pretrained(folder / "text_encoder")
    assert not list(folder.rglob("*.safetensors"))
    assert StableDiffusionPipeline.load_config(folder)["text_encoder"][1] == CLIPTextModel.__name__
    return folder


def test_a_large_teacher_without_weights_is_planned_at_once(large: Path, tmp_path: Path) -> None:
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    teacher = Teacher.planned(large)
    found = plan(METHODS["dmd2-full-gan"], teacher, Config(output_dir=tmp_path), prompts=["a red boot"], gpus=8, sharding="fsdp2")
    assert time.perf_counter() - clock < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert found.roles["teacher"].parameters == 859_520_964
    assert found.roles["student"].weights == 4 * 859_520_964
    assert found.roles["student"].per_gpu == pytest.approx(5 * 4 * 859_520_964 / 8, rel=1e-4)
    assert found.parts["text_encoder"].bytes > 4 * 120e6
    assert (found.refusals, found.unknown) == ([], [])


LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "net.0.proj",
    "net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv",
)


@pytest.mark.parametrize(("targets", "share"), [((), 1.02), (LAYERS, 1.05)])
def test_three_roles_on_one_backbone_weigh_little_more_than_the_backbone(
    targets: tuple[str, ...], share: float, large: Path, tmp_path: Path
) -> None:
    """Teacher, student and fake score of Stable Diffusion 1.5's size; copies would weigh 3."""
    teacher = Teacher.planned(large)
    method = TDM(train="lora", rank=16, lora_targets=targets)
    found = plan(method, teacher, Config(output_dir=tmp_path, batch_size=1), prompts=["a red boot"])
    weights = sum(role.weights for role in found.roles.values())
    assert found.roles["student"].weights == found.roles["fake_score"].weights > 0.002 * found.roles["teacher"].weights
    assert weights <= share * found.roles["teacher"].weights


def test_ten_billion_parameters_are_planned_without_any(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    teacher = Teacher.planned(weightless(tmp_path_factory, (1152, 2304, 4608, 4608)))
    found = plan(METHODS["swiftbrush"], teacher, Config(output_dir=tmp_path, batch_size=1), prompts=["a red boot"])
    assert time.perf_counter() - clock < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert found.roles["teacher"].parameters > 10e9
    assert found.roles["student"].optimizer >= 8 * found.roles["student"].trainable
    assert found.roles["fake_score"].weights < 0.02 * found.roles["teacher"].weights


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.scheduler = type(pipeline.scheduler)(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline.save_pretrained(tmp_path / "zero")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    teacher = Teacher.planned(tmp_path / "zero")
    found = plan(SwiftBrush(), teacher, Config(output_dir=tmp_path / "run"))
    assert [next(word for word in ("zero-terminal", "earlier run", "no prompts") if word in r) for r in found.refusals] == [
        "zero-terminal",
        "earlier run",
        "no prompts",
    ]
    assert found.export == {}
    half = plan(SwiftBrush(), Teacher.planned("fashion", dtype=torch.float16), Config(output_dir=tmp_path / "new"))
    assert ["half precision" in reason for reason in half.refusals] == [True]


def test_json_holds_the_whole_plan(tmp_path: Path) -> None:
    found = planned(METHODS["dmd2-lora-gan"], tmp_path)
    held = found.as_json()
    assert json.loads(json.dumps(held)) == held
    assert {field.name for field in dataclasses.fields(found)} <= held.keys()
    assert held["roles"]["fake_score"]["trainable"] == found.roles["fake_score"].trainable
