import time

import pytest
import torch
from torch import nn

from fastdiff.eval.cost import count_calls, energy, latency, network_of, parameters_m, peak_memory, size_mb

PROMPTS = ["a red boot on a white background", "a blue bag on a pink background"]


@pytest.mark.parametrize(("steps", "guidance", "nfe", "forwards"), [(1, 1.0, 1, 1), (4, 1.0, 4, 4), (4, 3.0, 8, 4)])
def test_guidance_counts_two(teacher, steps, guidance, nfe, forwards):
    teacher.set_progress_bar_config(disable=True)
    with count_calls(network_of(teacher)) as calls:
        images = teacher(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert calls.forwards == forwards
    assert calls.nfe(len(images)) == nfe


def test_a_bare_student_is_one_call(student):
    with count_calls(student.unet) as calls:
        student(PROMPTS)
    assert (calls.forwards, calls.samples) == (1, 2)


def test_calls_after_the_block_and_after_an_error_are_not_counted():
    network = nn.Linear(2, 2)

    def fail() -> None:
        with count_calls(network):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    with count_calls(network) as calls:
        network(input=torch.zeros(5, 2))
    network(torch.zeros(7, 2))
    assert (calls.forwards, calls.samples) == (1, 5)
    assert not network._forward_hooks


def test_a_pipeline_without_known_network_is_refused():
    with pytest.raises(ValueError, match="no `unet` and no `transformer`"):
        network_of(nn.Linear(1, 1))


def test_warm_up_is_not_timed():
    pauses = iter([0.4, 0.4, 0.004, 0.004, 0.004, 0.03, 0.004])
    timed = latency(lambda: time.sleep(next(pauses)), warmup=2, repeats=5)
    assert timed.repeats == 5
    assert 4 <= timed.p50_ms < 100
    assert 24 < timed.p95_ms < 300  # 0.8 of the way from 4 to 30 ms; the warm-up took 400


def test_a_latency_needs_a_call():
    with pytest.raises(ValueError, match="at least one"):
        latency(lambda: None, repeats=0)


def test_peak_memory_sees_what_was_freed_again_and_forgets_the_past():
    with peak_memory() as before:
        pass
    with peak_memory() as during:
        torch.ones(100 * 2**18).sum()  # 100 MiB
    with peak_memory() as after:
        pass
    assert during.peak_mib - before.peak_mib > 90
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system keeps one peak for the whole process")
    assert after.peak_mib < during.peak_mib - 90


def test_energy_is_the_difference_of_a_meter_and_unknown_without_one():
    readings = iter([5.0, 12.5])
    with energy(meter=lambda: next(readings)) as used:
        assert used.joules is None
    assert used.joules == 7.5
    with energy("cpu") as nothing:
        pass
    assert nothing.joules is None


def test_the_drivers_energy_is_positive():
    pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with energy("cuda") as used:
        x = torch.randn(4096, 4096, device="cuda")
        for _ in range(200):
            x = torch.nn.functional.normalize(x @ x)
    assert used.joules is None or used.joules > 0  # None on boards without the counter


def test_shared_parameters_count_once_and_buffers_do_not():
    a, b = nn.Linear(3, 4), nn.BatchNorm1d(4)
    assert parameters_m(a) == (3 * 4 + 4) / 1e6
    assert parameters_m(a, nn.Sequential(a, b)) == (3 * 4 + 4 + 2 * 4) / 1e6


def test_size_on_disk_counts_every_file_once_through_links(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "weights").write_bytes(b"x" * 1500)
    (tmp_path / "blob").write_bytes(b"x" * 700)
    (tmp_path / "model" / "link").symlink_to(tmp_path / "blob")
    (tmp_path / "model" / "again").symlink_to(tmp_path / "blob")
    assert size_mb(tmp_path / "model") == 2200 / 1e6
    assert size_mb(tmp_path / "model", tmp_path / "blob") == 2200 / 1e6
