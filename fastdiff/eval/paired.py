"""Which of two models is nearer to the reference, when both drew from the same seeds and prompts?

The difference FD(x) - FD(y) of sets whose rows i share seed and prompt has the standard error

    se = sd(I_x(x_i) - I_y(y_i)) / sqrt(n)

with the influences of ``frechet``: what both models do alike with a seed cancels, so the error is often much smaller than
that of either distance, and so is the bias c / n. (The delta method; recalled as standard, not from a paper on FID.)
"""

from torch import Tensor

from fastdiff.eval.frechet import frechet, influences
from fastdiff.eval.stats import Score, Stats


def paired_difference(x: Tensor, y: Tensor, reference: Stats, *, root: Tensor | None = None) -> Score:
    """FD of ``x`` less FD of ``y``, both [n, d] and of the same seeds row by row, with its standard error.

    Negative where ``x`` is the better set. ``root`` as in ``frechet``. ``ValueError`` for sets of different sizes.
    """
    if x.shape != y.shape:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(y.shape)} do not pair: row i of both must be of one seed.")
    a, b = (Stats.of(f, extractor=reference.extractor) for f in (x, y))
    values = [frechet(s, reference, features=f, root=root, error=False).value for s, f in ((a, x), (b, y))]
    moves = influences(x, a, reference, root=root) - influences(y, b, reference, root=root)
    return Score(values[0] - values[1], Score.of(moves).se)
