r"""Divergences of a student law q from a teacher law p: from logits, between Gaussians, and as generators f.

    D_f(p || q) = E_q f(r),  r = p / q,  f convex, f(1) = 0
    its gradient along a generator of q is -E_q[h(r) (score_p - score_q) dx],  h(r) = r^2 f''(r)

so one scalar function turns the reverse-KL direction of DMD (h = 1) into any f-divergence. f may be changed by a multiple of
r - 1 without changing D_f or h. The scale of every f is chosen such that h is the sheet's: Jensen-Shannon and softened reverse KL
are then twice the divergence from the mean law, Hellinger twice sum (sqrt p - sqrt q)^2 and Neyman half of chi^2.

In the categorical forms p = softmax(teacher / T), q = softmax(student / T), all in log space; the mixtures m are differentiated,
their gradient belongs to the definition. f-distill (2025, arXiv 2502.15681); f and f' are derived from its h.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.losses.precision import widened

F_DIVERGENCES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {  # kind: r -> f, f', f''
    "reverse_kl": lambda r: (-r.log(), -1 / r, r**-2),
    "forward_kl": lambda r: (r * r.log(), r.log() + 1, 1 / r),
    "jensen_shannon": lambda r: (
        r * r.log() - (1 + r) * ((1 + r) / 2).log(),
        (2 * r / (1 + r)).log(),
        1 / (r * (1 + r)),
    ),
    "softened_reverse_kl": lambda r: (
        (1 + r) * ((1 + r) / (2 * r)).log(),
        ((1 + r) / (2 * r)).log() - 1 / r,
        1 / (r.square() * (1 + r)),
    ),
    "neyman": lambda r: ((1 - r).square() / (2 * r), (1 - r**-2) / 2, r**-3),
    "squared_hellinger": lambda r: (2 * (1 - r.sqrt()).square(), 2 - 2 * r.rsqrt(), r**-1.5),
    "jeffreys": lambda r: ((r - 1) * r.log(), r.log() + 1 - 1 / r, 1 / r + r**-2),
}


def f_generator(ratio: Tensor, *, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' of an f-divergence at ``ratio`` = p / q > 0, each like it.

    Raises:
        ValueError: ``kind`` is no key of ``F_DIVERGENCES``.
    """
    if kind not in F_DIVERGENCES:
        raise ValueError(f"no f-divergence {kind!r} is known; the kinds are {', '.join(F_DIVERGENCES)}.")
    return F_DIVERGENCES[kind](widened(ratio))


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of two categorical distributions given by logits.

    Args:
        student, teacher: logits [..., V]. Entries that both set to -inf count as absent; one that only the student
            excludes costs about the largest float.
        temperature: T > 0 divides both; the value is **not** multiplied by T**2.

    Returns:
        [...] in float32 or better, one value a position: reduce with ``losses.reduce``, which needs the mask.

    Raises:
        ValueError: different numbers of logits.

    Minimised over the student it covers every mode of the teacher; its gradient w.r.t. the student logits is (q - p) / T.
    """
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), arguments and result as in ``forward_kl``.

    It seeks a mode; its gradient w.r.t. the student logits is q (log q - log p - D) / T.
    """
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_q, log_p)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)``, m = beta p + (1 - beta) q; otherwise as ``forward_kl``.

    ``beta`` in (0, 1) is the teacher's weight. D / beta tends to ``forward_kl`` as beta vanishes and D / (1 - beta) to
    ``reverse_kl`` as it tends to 1; D itself tends to 0 at both ends. At most the entropy of (beta, 1 - beta).

    Raises:
        ValueError: ``beta`` is not inside (0, 1), where the divergence is 0 whatever the student does.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta}: at 0 and 1 this divergence is 0 and trains nothing. Use forward_kl or reverse_kl.")
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skewed_forward_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """``KL(p || skew p + (1 - skew) q)``, ``skew`` in (0, 1): at most -log skew, and ``forward_kl`` as skew vanishes."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_p, _mixture(log_p, log_q, skew))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """``KL(q || skew q + (1 - skew) p)``, ``skew`` in (0, 1): at most -log skew, and ``reverse_kl`` as skew vanishes."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_q, _mixture(log_q, log_p, skew))


def total_variation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``sum |p - q| / 2`` in [0, 1], otherwise as ``forward_kl``; 1 - D is the mass the two share. Subgradient 0 at p = q."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def gaussian_kl(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, elementwise ``(lv_q - lv_p + (v_p + (m_p - m_q)^2) / v_q - 1) / 2``: the sum is the KL."""
    gap = widened(log_variance_p) - widened(log_variance_q)
    distance = (widened(mean_p) - widened(mean_q)).square()
    return 0.5 * (gap.expm1() - gap + distance * (-widened(log_variance_q)).exp())


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student has {student.shape[-1]} logits and teacher {teacher.shape[-1]}: their softmaxes are over different sets, "
            "and a shared prefix would compare other classes. Bring both to one set of classes first."
        )
    log_q, log_p = ((widened(x) / temperature).log_softmax(dim=-1) for x in (student, teacher))
    # -inf - -inf is NaN, in the gradient too; the lowest finite number still has probability 0
    return log_q.clamp_min(torch.finfo(log_q.dtype).min), log_p.clamp_min(torch.finfo(log_p.dtype).min)


def _mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)
