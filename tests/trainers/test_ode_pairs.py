"""ODE-pair regression."""

from pathlib import Path

import torch
from tiny import tiny_teacher

from fastdiff import Trainer
from fastdiff.trainers import ODEPairs
from fastdiff.trainers.method import Method, one_step

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {"guided": ODEPairs(**PAIRS), "unguided": ODEPairs(pair_guidance_scale=1.0, **PAIRS)}


def started(tmp_path: Path, **fields: object) -> Trainer:
    run = Trainer(ODEPairs(**PAIRS, **fields), tiny_teacher(), output_dir=tmp_path, max_steps=9, batch_size=4)
    run.start()
    return run


def test_the_loss_is_the_pseudo_huber_distance_to_the_stored_result(tmp_path: Path) -> None:
    run = started(tmp_path, huber_c=0.2)
    batch = run._micro_batches(0)[0]
    loss = run.method.loss("regression", batch, run._roles)["regression"]
    noise, x0, cond = run.method.draw_pairs(batch)
    d = one_step(run._roles.denoiser("student"), noise, cond) - x0
    run.close()
    assert torch.allclose(loss, ((d**2 + 0.04).sqrt() - 0.2).mean(), rtol=1e-5)


def test_a_student_that_repeats_the_pairs_has_zero_loss(tmp_path: Path) -> None:
    run = started(tmp_path)
    pairs = run.method._pairs
    batch = run._micro_batches(0)[0]
    noise, _, cond = run.method.draw_pairs(batch)
    with torch.no_grad():
        exact = one_step(run._roles.denoiser("student"), noise, cond)
    rows = batch.draws.integers("pairs", 0, len(pairs))
    pairs.x0[rows] = exact
    loss = run.method.loss("regression", batch, run._roles)["regression"]
    run.close()
    assert loss.abs() < 1e-6


def test_pairs_are_reused_by_a_resumed_run(tmp_path: Path) -> None:
    run = started(tmp_path)
    first, path = run.method._pairs, tmp_path / "pairs-0.safetensors"
    written = path.stat().st_mtime_ns
    run._save()
    run.close()
    again = Trainer(ODEPairs(**PAIRS), tiny_teacher(), output_dir=tmp_path, max_steps=9, batch_size=4, resume=True)
    again.start()
    again.close()
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first.x0, again.method._pairs.x0)
