"""The rollout pool: one trajectory of the student, without gradient, feeds every update until the student changes.

A student of K steps is trained on its own inputs: to see what it gets at step i, it is run from noise to there (DMD2 calls it
backward simulation). Between two student updates it is frozen, so a cycle of n fake-score updates and one student update needs one
rollout: n B / K trajectories have n B moments (rung, state, x0), shuffled over samples and rungs. Each fake-score update takes B
of them as its samples; the student's update takes B as its inputs, which are already there.

    forwards a cycle, K = 4, n = 5, a backward counting 2:    5 rollout + 5 x 3 fake score + (3 student + 1 fake + 2 teacher) = 26

Where n B / K is no integer one trajectory more is run. Every draw is of the cycle's first iteration, so a run resumed within a
cycle makes the same pool again from the same weights. Rungs differ between the samples of a batch: DMD2's code draws one for all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.models.roles import Roles
from fastdiff.trainers.draws import Draws, generator_for
from fastdiff.trainers.method import Batch
from fastdiff.trainers.trajectory import Sampler, trajectory

ROLLOUT = "rollout"
"""The update that fills the pool; it trains nobody."""


def pooled_updates(step: int, uses: int) -> tuple[str, ...]:
    """The updates of an iteration: the rollout first in each cycle of ``uses``, the student last in it.

    >>> [pooled_updates(step, 3) for step in range(3)]
    [('rollout', 'fake_score'), ('fake_score',), ('fake_score', 'student')]
    """
    first, last = step % uses == 0, step % uses == uses - 1
    return (*[ROLLOUT] * first, "fake_score", *["student"] * last)


@dataclass(frozen=True)
class Moments:
    """States on student trajectories: ``x_t`` [n, ...], where ``rung`` [n] counts from the noise, the ``x0`` made of it, the state
    ``after`` the step (x0 itself after the last), and the trajectory's ``prompt`` [n], an index."""

    rung: Tensor
    x_t: Tensor
    x0: Tensor
    after: Tensor
    prompt: Tensor

    def take(self, rows: Tensor) -> "Moments":
        rows = rows.to(self.rung.device)
        return Moments(*(value[rows] for value in vars(self).values()))

    @classmethod
    def concat(cls, parts: list["Moments"]) -> "Moments":
        return cls(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass
class RolloutPool:
    """Pools of the running cycle, one for each rank whose draws are asked for.

    Args:
        levels: of the student, falling.
        uses: fake-score updates in a cycle.
    """

    levels: list[int]
    sampler: Sampler
    uses: int

    def __post_init__(self) -> None:
        self._owner: Roles | None = None
        self._cycle, self._pools = -1, dict[tuple[int, ...], Moments]()

    def fill(self, batch: Batch, roles: Roles, cycle: int) -> None:
        """Make the pools of the cycle that starts at iteration ``cycle``, unless they are there, of these very roles."""
        if cycle != self._cycle or self._owner is not roles:
            self._owner, self._cycle, self._pools = roles, cycle, {}
        for draws in batch.draws.ranks:
            if draws.key[:2] not in self._pools:
                self._pools[draws.key[:2]] = self._roll_out(draws, batch, roles)

    def fake_score_samples(self, batch: Batch, roles: Roles, cycle: int, use: int) -> Moments:
        """The moments of the cycle's ``use``-th fake-score update; no moment is used twice."""
        self.fill(batch, roles, cycle)
        return Moments.concat([self._rows(draws, "fake_score", use) for draws in batch.draws.ranks])

    def student_inputs(self, batch: Batch, roles: Roles, cycle: int) -> Moments:
        """The moments whose states the student's update starts from."""
        self.fill(batch, roles, cycle)
        return Moments.concat([self._rows(draws, "student", 0) for draws in batch.draws.ranks])

    def _rows(self, draws: Draws, name: str, use: int) -> Moments:
        pool = self._pools[draws.key[:2]]
        order = torch.randperm(len(pool.rung), generator=generator_for(*draws.key[:2], self._cycle, f"pool-{name}"))
        return pool.take(order[use * draws.size : (use + 1) * draws.size][draws.part])

    @torch.no_grad()
    def _roll_out(self, draws: Draws, batch: Batch, roles: Roles) -> Moments:
        n = -(-self.uses * draws.size // len(self.levels))
        draws, shape, steps = draws.at(self._cycle, n), batch.teacher.latent_shape, len(self.levels)
        noise = [draws.normal(f"pool_noise_{i}", shape) for i in range(steps if self.sampler == "consistency" else 1)]
        prompt = batch.prompts.rows(draws.integers("pool_prompts", 0, batch.prompts.drawable))
        student = roles.denoiser("student")
        parts = []
        for rows in torch.arange(n, device=prompt.device).split(len(batch)):
            fresh = [z[rows] for z in noise]
            cond = batch.prompts.conditions(prompt[rows])
            made = trajectory(student, fresh[0], cond, self.levels, self.sampler, fresh.__getitem__)
            states, x0 = torch.stack([m.x_t for m in made] + [made[-1].x0]), torch.stack([m.x0 for m in made])
            rung = torch.arange(steps, device=rows.device)[:, None].expand(-1, len(rows))
            parts.append((rung, states[:-1], x0, states[1:], prompt[rows].expand(steps, -1)))
        return Moments(*(torch.cat(values, dim=1).flatten(0, 1) for values in zip(*parts, strict=True)))  # [K, n] moments
