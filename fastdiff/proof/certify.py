"""A certificate: a method trained by the real ``Trainer`` on a law in closed form, until the law is recovered.

Every metric of the method's ``trials`` is a row: its value, the bound it must stay under, the same metric of the teacher with as
many network calls (the baseline), and that of fresh exact samples (the floor, which nothing can beat but by luck).
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.reference import reference_flow_map
from fastdiff.eval.distributions import covariance_error, gaussian_w2, mode_masses, sliced_w2
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.proof.laws import LAWS, draw_labels, teacher
from fastdiff.trainers.config import Config
from fastdiff.trainers.draws import generator_for
from fastdiff.trainers.engine import Trainer
from fastdiff.trainers.method import Method, Trial


@dataclass(frozen=True)
class Row:
    """One figure of a certificate."""

    method: str
    law: str
    metric: str
    value: float
    bound: float
    baseline: float
    floor: float
    seconds: float
    seed: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Below the bound; nan is not."""
        return self.value <= self.bound

    def as_json(self) -> dict[str, Any]:
        """The row with its verdict under ``pass``; a number that is not finite is None, as JSON has none."""
        return {k: _finite(v) for k, v in asdict(self).items()} | {"pass": self.passed}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Drawn:
    """Samples with what they were made from."""

    samples: Tensor
    labels: Tensor
    noise: Tensor


FIXED_POINT = "fixed-point"


def certificates(method: type[Method]) -> list[str]:
    """What ``certify`` can prove of a method: its fixed point, which needs no training, and the laws of its trials."""
    return [*([FIXED_POINT] if method.fixed_point else []), *method.trials]


def certify_fixed_point(method: Method, *, seed: int = 0) -> Row:
    """The largest gradient of a generated sample where the generator has the teacher's law and every score is exact.

    It is zero but for round-off (float64). The baseline is the same figure for a generator whose means are 0.3 off and whose
    deviations are a fifth too large: a method that gives its samples no gradient at all would not pass by that.
    """
    clock = time.perf_counter()
    gradients = [
        sample_gradients(method, setting, update=method.fixed_point)[0].abs().max().item()
        for setting in (Setting(seed=seed), Setting(shift=0.3, spread=1.2, seed=seed))
    ]
    value, away = gradients
    seconds = round(time.perf_counter() - clock, 1)
    value = value if away > 1e-3 else float("inf")
    return Row(method.name(), FIXED_POINT, "gradient", value, 1e-10, away, 0.0, seconds, seed)


def certify(method: type[Method], law: str, *, seed: int = 0) -> list[Row]:
    """The certificate of ``method`` in the trial ``law`` of its ``trials``, or of its fixed point."""
    if law == FIXED_POINT:
        fields = {**next(iter(method.trials.values())).fields, **method.fixed_point_fields}
        return [certify_fixed_point(method(**fields), seed=seed)]
    trial = method.trials[law]
    return certify_instance(method(**trial.fields), law, trial, seed=seed)


def certify_instance(method: Method, law: str, trial: Trial, *, seed: int = 0) -> list[Row]:
    """The same for a method with settings, or defects, of its own. One thread: such small networks lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _certify(method, law, trial, seed)
    finally:
        torch.set_num_threads(threads)


def _certify(method: Method, name: str, trial: Trial, seed: int) -> list[Row]:
    clock, law = time.perf_counter(), trial.law or name
    oracle = teacher(law, seed=seed)
    exact: GaussianMixture = oracle.law  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            output_dir=Path(folder) / "run",
            max_steps=trial.max_steps,
            batch_size=trial.batch_size,
            ema_decay=trial.ema_decay,
            seed=seed,
            validate_every=0,
            save_every=trial.max_steps,
            log_every=max(trial.max_steps // 20, 1),
        )
        network = Trainer(method, oracle, config=config).train().cpu()
        oracle.family.to("cpu")  # wherever it was trained, laws and draws are there
    generator = generator_for(seed, "certificate", law)
    n = LAWS[law].samples
    labels = draw_labels(exact, n, generator)
    noise = torch.randn(n, *exact.shape, generator=generator)
    with torch.no_grad():
        drawn = Drawn(method.draw(network, oracle, noise, labels, generator), labels, noise)
        plain = Drawn(method.sample(oracle.denoiser, noise, labels, generator), labels, noise)
    fresh = Drawn(exact.sample(n, generator, labels), labels, noise)
    reference = exact.sample(n, generator, labels)
    seconds = time.perf_counter() - clock
    rows = []
    for metric, bound in trial.bounds.items():
        measure = METRICS[metric]
        value, baseline, floor = (measure(exact, given, reference) for given in (drawn, plain, fresh))
        details = {"masses": masses(exact, drawn).tolist()} if metric == "mode_mass" else {}
        if metric == "flow_map":
            floor = 0.0
        rows.append(Row(method.name(), name, metric, value, bound, baseline, floor, round(seconds, 1), seed, details))
    return rows


def masses(law: GaussianMixture, drawn: Drawn) -> Tensor:
    """Share of the samples in each component [K]; in no component when further than 4 deviations of isotropic ones."""
    samples = drawn.samples.flatten(1).double()
    if law.variances.ndim == 1:
        return mode_masses(samples, law.means, law.variances.sqrt())
    return torch.bincount(law.mode_of(samples), minlength=len(law.means)) / len(samples)


def _sliced_w2(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """The largest over the classes."""
    groups = [drawn.labels == label for label in drawn.labels.unique()]
    return max(sliced_w2(drawn.samples[group], reference[group]) for group in groups)


def _w2(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    return gaussian_w2(drawn.samples, *law.moments())


def _covariance(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    return covariance_error(drawn.samples, law.moments()[1])


def _mode_mass(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """The largest error of a mode's share, in units of that share: a lost mode is 1."""
    return ((masses(law, drawn) - law.weights).abs() / law.weights).max().item()


def _stray(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """The share of samples in no mode."""
    return 1 - masses(law, drawn).sum().item()


def _mode_spread(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """The largest relative error of a mode's standard deviation, of its samples within 4 deviations; a mode without any is 1."""
    samples, deviations = drawn.samples.flatten(1).double(), law.variances.sqrt()
    distance, mode = (torch.cdist(samples, law.means) / deviations).min(dim=1)
    errors = []
    for k in range(len(law.means)):
        own = samples[(mode == k) & (distance < 4)]
        errors.append(1.0 if len(own) < 3 else abs(own.var(dim=0).mean().sqrt().item() / deviations[k].item() - 1))
    return max(errors)


def _axes(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """The largest ``|eigenvalue of C^-1/2 S C^-1/2 - 1|``: a direction without any variance is 1, however small it is."""
    factor = torch.linalg.cholesky(law.moments()[1])
    white = torch.linalg.solve_triangular(factor, drawn.samples.flatten(1).double().T, upper=False)
    return (torch.linalg.eigvalsh(torch.cov(white)) - 1).abs().max().item()


def _flow_map(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """Root mean square distance to the exact end of each noise's own trajectory, in units of the law's deviation."""
    n = min(len(drawn.noise), 1000)
    t = law.process.at_level(torch.tensor(LEVELS - 1)).expand(n)
    noise = law.process.initial_scale * drawn.noise[:n].double()
    if isinstance(law, Gaussian):
        end = law.consistency(noise, t)
    else:
        end = reference_flow_map(law, noise, t, None, drawn.labels[:n], rtol=1e-6)
    error = (drawn.samples[:n].double() - end).square().flatten(1).sum(1).mean()
    return (error / law.moments()[1].trace()).sqrt().item()


def _posterior_mean(law: GaussianMixture, drawn: Drawn, reference: Tensor) -> float:
    """Root mean square distance to the law's ``E[x0 | x_T]`` of each noise, relative to the size of that mean."""
    t = law.process.at_level(torch.tensor(LEVELS - 1)).expand(len(drawn.noise))
    exact = law(law.process.initial_scale * drawn.noise.double(), t, drawn.labels).x0
    return ((drawn.samples.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


METRICS: dict[str, Callable[[GaussianMixture, Drawn, Tensor], float]] = {
    "sliced_w2": _sliced_w2,
    "w2": _w2,
    "covariance": _covariance,
    "axes": _axes,
    "mode_mass": _mode_mass,
    "mode_spread": _mode_spread,
    "stray": _stray,
    "flow_map": _flow_map,
    "posterior_mean": _posterior_mean,
}
