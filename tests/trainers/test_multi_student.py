"""Several students: equal to the plain method when there is one, apart from each other when there are more."""

import dataclasses
from pathlib import Path

import pytest
import torch
from short_runs import tensors_of
from tiny import tiny_flow_teacher, tiny_teacher

from fastdiff import Teacher, Trainer
from fastdiff.data.partition import Partition
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.roles import Roles, Start
from fastdiff.models.smaller import smaller
from fastdiff.proof import laws
from fastdiff.trainers import DMD2, ODEPairs, SwiftBrush, TeacherScoreMatching
from fastdiff.trainers.config import Config
from fastdiff.trainers.method import Method, one_step
from fastdiff.trainers.multi_student import MultiStudent, Stage, sample_routed

LABELS = ["0", "1", "2"]
PAIRS = {"pairs": 30, "pair_steps": 2}
OPTIONS = {"max_steps": 4, "batch_size": 8, "validate_every": 0, "ema_decay": 0.5}
DM = DMD2(guidance_scale=1.0, ratio=(1, 2), lr=1e-3, warm_start_steps=2, **PAIRS)


def teacher() -> Teacher:
    law = GaussianMixture.classes(laws.process())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TimeMLP(2, hidden=8, classes=3)
    return Teacher.from_module(network, law.process, "v_prediction", shape=(2,), prompts=LABELS, law=law)


def students(folder: Path, k: int, stages: dict[str, Stage] | None = None, **fields: object) -> MultiStudent:
    stages = stages or {"dm": Stage(method=DM, config=Config.of(**OPTIONS))}
    return MultiStudent(teacher=teacher(), partition=Partition.by_class(LABELS, k), stages=stages, folder=folder, **fields)


@pytest.mark.parametrize(
    "method", [DM, SwiftBrush(guidance_scale=1.0, rank=2), ODEPairs(**PAIRS)], ids=["dmd2", "swiftbrush", "pairs"]
)
def test_one_student_is_the_plain_method_to_the_bit(method: Method, tmp_path: Path) -> None:
    Trainer(dataclasses.replace(method), teacher(), prompts=LABELS, output_dir=tmp_path / "plain", **OPTIONS).train()
    run = students(tmp_path / "multi", 1, {"dm": Stage(method=method, config=Config.of(**OPTIONS))})
    run.train()
    plain, multi = tensors_of(tmp_path / "plain"), tensors_of(run.run_folder("dm", 0))
    assert plain.keys() == multi.keys()
    assert all(torch.equal(value, multi[name][key]) for name, values in plain.items() for key, value in values.items())


def test_a_student_is_trained_on_conditions_of_its_own_part_alone(tmp_path: Path) -> None:
    run = Trainer(DM, teacher(), prompts=LABELS, part=[2, 0], output_dir=tmp_path, **OPTIONS)
    run.start()
    seen = torch.cat([batch.cond for step in range(20) for batch in run._micro_batches(step)])
    assert set(seen.tolist()) == {0, 2}
    assert abs((seen == 0).float().mean() - 0.5) < 0.1
    assert set(run._fixed(50)[0]) == {"0", "2"}  # validation and export too
    run.close()


def test_pairs_are_shared_where_they_are_regressed_on_and_not_where_they_are_the_real_samples(tmp_path: Path) -> None:
    run = Trainer(DM, teacher(), prompts=LABELS, part=[1], output_dir=tmp_path, **OPTIONS)
    run.start()
    batches = [batch for step in range(20) for batch in run._micro_batches(step)]
    assert set(torch.cat([run.method.draw_pairs(batch)[2] for batch in batches]).tolist()) == {0, 1, 2}
    real = [run.method.draw_pairs(batch, own=True) for batch in batches]
    assert set(torch.cat([cond for _, _, cond in real]).tolist()) == {1}
    pairs, stored = run.method._pairs, {tuple(x) for x in run.method._pairs.x0[run.method._pairs.prompt == 1].tolist()}
    assert len(pairs) == 30
    assert {tuple(x) for x in torch.cat([x0 for _, x0, _ in real]).tolist()} <= stored
    run.close()


def test_pairs_without_a_prompt_of_the_part_are_refused(tmp_path: Path) -> None:
    run = Trainer(dataclasses.replace(DM, pairs=1), teacher(), prompts=LABELS, part=[1], output_dir=tmp_path, **OPTIONS)
    run.start()
    run.method._pairs.prompt[:] = 0
    with pytest.raises(UserError, match="none of 1 pairs"):
        run.method.draw_pairs(run._micro_batches(0)[0], own=True)
    run.close()


def test_training_one_student_leaves_the_others_as_they_are_to_the_bit(tmp_path: Path) -> None:
    run = students(tmp_path, 3)
    assert run.train([0]) is None
    assert run.missing() == [1, 2]
    before = tensors_of(run.run_folder("dm", 0))
    teacher_before = run.teacher.weights_hash()
    assert run.train([1]) is None
    networks = students(tmp_path, 3).train([2])  # another process, which finds the others' and exports
    after = tensors_of(run.run_folder("dm", 0))
    assert all(torch.equal(value, after[name][key]) for name, values in before.items() for key, value in values.items())
    assert run.teacher.weights_hash() == teacher_before
    assert len(networks) == 3
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert not torch.equal(weights[0], weights[1])
    files = [run.run_folder("dm", k) / "pairs-0.safetensors" for k in range(3)]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_a_student_does_not_depend_on_the_order_or_the_company_it_is_trained_in(tmp_path: Path) -> None:
    alone, together = students(tmp_path / "alone", 3), students(tmp_path / "together", 3)
    alone.train([2])
    together.train([1, 0, 2])
    first, second = (tensors_of(run.run_folder("dm", 2)) for run in (alone, together))
    assert all(torch.equal(value, second[name][key]) for name, values in first.items() for key, value in values.items())


def test_a_stage_begins_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    """With learning rates of zero nothing moves, so the last stage's weights are the first's, fake score included."""
    still = dataclasses.replace(DM, lr=0.0, fake_score_lr=0.0, warm_start_steps=0)
    config = Config.of(**OPTIONS)
    stages = {"dm": Stage(method=DM, config=config), "later": Stage(method=still, config=config)}
    run = students(tmp_path, 3, stages)
    run.train([1])
    first, later = (tensors_of(run.run_folder(name, 1)) for name in ("dm", "later"))
    untouched = Roles(teacher(), DM.roles())
    for role in ("role.student", "role.fake_score"):
        assert all(torch.equal(value, later[role][key]) for key, value in first[role].items())
        fresh = untouched.state(role.removeprefix("role."))
        assert any(not torch.equal(value, later[role][key]) for key, value in fresh.items())


def test_small_students_start_from_one_shared_match_of_the_teachers_score(tmp_path: Path) -> None:
    config = Config.of(**OPTIONS)
    still = dataclasses.replace(DM, lr=0.0, fake_score_lr=0.0, warm_start_steps=0)
    match = Stage(method=TeacherScoreMatching(width=0.5, **PAIRS), config=config, shared=True)
    run = students(tmp_path, 3, {"tsm": match, "dm": Stage(method=still, config=config)})
    networks = run.train()
    shared = tensors_of(tmp_path / "runs" / "all" / "tsm")["role.student"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["0", "1", "2", "all"]
    for k, network in enumerate(networks):
        assert network.out.in_features == 4
        assert all(torch.equal(value, tensors_of(run.run_folder("dm", k))["role.student"][key]) for key, value in shared.items())
    fake = tensors_of(run.run_folder("dm", 0))["role.fake_score"]
    assert fake["out.weight"].shape == (2, 8), "the fake score stays of full size"


def test_routed_samples_are_in_the_order_of_their_noise(tmp_path: Path) -> None:
    run = students(tmp_path, 3)
    networks = [Denoiser(network, run.teacher.process, "v_prediction") for network in run.train()]
    assert run.result["export_max_abs_diff"] < 1e-5
    generator = torch.Generator().manual_seed(1)
    labels, noise = torch.randint(0, 3, (30,), generator=generator), torch.randn(30, 2, generator=generator)
    found = sample_routed(networks, labels, noise, labels, one_step)
    one_by_one = torch.cat([one_step(networks[k], noise[i : i + 1], labels[i : i + 1]) for i, k in enumerate(labels.tolist())])
    assert torch.allclose(found, one_by_one, atol=1e-6)
    order = torch.randperm(30, generator=generator)
    assert torch.allclose(sample_routed(networks, labels[order], noise[order], labels[order], one_step), found[order], atol=1e-6)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, cut = students(tmp_path / "straight", 3), students(tmp_path / "cut", 3)
    straight.train()
    cut.train([0])
    with pytest.raises(UserError, match="--resume"):
        cut.train()
    cut.resume = True
    networks = cut.train()
    assert len(networks) == 3
    for k in range(3):
        first, second = (tensors_of(run.run_folder("dm", k)) for run in (straight, cut))
        assert all(torch.equal(value, second[name][key]) for name, values in first.items() for key, value in values.items())


def test_a_network_of_ones_own_is_where_the_student_begins() -> None:
    given, specs = teacher(), DM.roles()
    small = smaller(given.family.backbone, width=0.5)
    roles = Roles(given, specs, Start(network=small))
    assert all(torch.equal(value, roles.state("student")[key]) for key, value in small.state_dict().items())
    assert roles.modules["student"] is not small
    assert roles.state("fake_score")["out.weight"].shape == (2, 8)
    assert Start(network=small).hash() != Start(network=smaller(given.family.backbone, width=0.25)).hash()
    with pytest.raises(UserError, match="LoRA"):
        Roles(given, {"student": dataclasses.replace(specs["student"], train="lora")}, Start(network=small))


@pytest.mark.parametrize("shared", [(True,), (False, True), (True, False, True)])
def test_stages_that_would_make_all_students_the_same_are_refused(shared: tuple[bool, ...], tmp_path: Path) -> None:
    stages = {str(i): Stage(method=DM, config=Config(), shared=value) for i, value in enumerate(shared)}
    with pytest.raises(UserError, match="shared"):
        students(tmp_path, 3, stages)


def test_a_teacher_whose_students_no_pipeline_routes_is_refused_before_the_training(tmp_path: Path) -> None:
    stages = {"dm": Stage(method=DM, config=Config.of(**OPTIONS))}
    with pytest.raises(UserError, match="fashion-flow is a SanaPipeline"):
        MultiStudent(teacher=tiny_flow_teacher(), partition=Partition.by_class(LABELS, 2), stages=stages, folder=tmp_path)


def test_a_student_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.\.2"):
        students(tmp_path, 3).train([3])


def test_a_part_outside_the_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="part"):
        Trainer(DM, tiny_teacher(), part=[10**6], output_dir=tmp_path)
