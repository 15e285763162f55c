"""A law of whole loss curves under any learning-rate schedule."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law, LawError, Parameter, coefficient, exponent

# Drops that are summed at a time. A schedule has thousands, and an array [rows, drops] would not fit.
BLOCK = 256
# [rate drop, rate, sum of rates before]: a drop that never comes, to fill up shorter schedules.
NO_DROP = (0.0, 1.0, np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class MultiPower(Law):
  """L(t) = E + A (S(t) + S_before)^-alpha - LD(t), S the sum of learning rates (Luo et al. 2025, equation 1).

  LD(t) = B sum_k (lr_{k-1} - lr_k) G(lr_k^-gamma S_k(t)), G(x) = 1 - (C x + 1)^-beta, over the steps k <= t
  at which the rate changed; S_k(t) sums the rates from k to t. The sum is exact, and runs over the rises of a
  warm-up as over drops.

  `points` makes the rows of a run.

  Attributes:
    schedules: the learning rates of each run's steps, with the warm-up, an array [steps] each.
    before: the sum of rates before the first of these steps, the same for all.
    knots: gather the changes of each schedule into at most so many, for a quick and approximate fit.
  """

  schedules: Sequence[np.ndarray]
  before: float = 0.0
  knots: int | None = None

  source = 'Luo et al. 2025, arXiv:2503.12811, equation 1'
  form = 'E + A S^-alpha - B sum_k (lr_{k-1} - lr_k) (1 - (1 + C lr_k^-gamma S_k)^-beta)'
  inputs = ('lr_sum', 'lr_main', 'schedule')
  plain = ('schedule', 'lr_main')
  E = coefficient('irreducible loss, nats per token', (0.3, 0.8))
  A = coefficient('size of the power law in S', (0.1, 0.4), lr_sum='alpha')
  alpha = exponent('exponent of S', (0.2, 0.5, 0.9))
  B = Parameter('gain per unit of learning rate dropped', start=(30.0, 300.0), low=-5.0)
  C = Parameter('how soon a drop pays', start=(0.3, 3.0), low=-10.0)
  beta = exponent('exponent of that', (0.3, 0.8))
  gamma = exponent('how the rate slows it', (0.3, 0.7))

  def __post_init__(self):
    lists = [self._drops(np.asarray(lr, np.float64)) for lr in self.schedules]
    longest = max(len(drops) for drops in lists)
    padded = []
    for drops in lists:
      padded.append(np.concatenate([drops, np.tile(NO_DROP, (longest - len(drops), 1))]))
    # The dataclass is frozen: a law is a static argument of jax.jit.
    object.__setattr__(self, 'drops', np.stack(padded))

  def _drops(self, lr) -> np.ndarray:
    """(drop of the rate, rate after it, sum of rates before that step) of each change, [drops, 3].

    Raises:
      LawError: a schedule is not a list of rates of zero or more.
    """
    if lr.ndim != 1 or len(lr) == 0 or not np.isfinite(lr).all() or (lr < 0).any():
      raise LawError('MultiPower.schedules: a schedule is a list of learning rates, none negative.')
    falls = -np.diff(lr)
    changes = np.flatnonzero(falls != 0) + 1
    if len(changes) == 0:
      return np.array([NO_DROP])
    rate = np.maximum(lr[changes], 1e-30)  # in G, a rate of zero pays all at once
    drops = np.stack([falls[changes - 1], rate, np.cumsum(lr)[changes - 1]], 1)
    if self.knots is None or len(drops) <= self.knots:
      return drops
    groups = np.array_split(np.arange(len(changes)), self.knots)
    return np.array([[drops[g, 0].sum(), *drops[g, 1:].mean(0)] for g in groups])

  def points(self, schedule: int, steps) -> dict[str, np.ndarray]:
    """Inputs for the losses of run `schedule` after `steps` of its steps (counted from 1)."""
    done = np.cumsum(self.schedules[schedule])[np.asarray(steps) - 1]
    return {
      'lr_sum': done + self.before,
      'lr_main': done,
      'schedule': np.full(len(done), float(schedule)),
    }

  def predict(self, p, x):
    """The loss of each row. Drops are summed in blocks, so that memory does not grow with the schedule."""
    which = jnp.asarray(x.schedule).astype(int)
    done = jnp.asarray(x.lr_main)[..., None]
    count = self.drops.shape[1]
    size = min(BLOCK, count)
    padding = [(0, 0), (0, -count % size), (0, 0)]
    blocks = np.pad(self.drops, padding, constant_values=np.inf)
    blocks = np.moveaxis(blocks.reshape(len(blocks), -1, size, 3), 1, 0)

    def wide(value):
      return jnp.asarray(value)[..., None]

    def add(total, block):
      fell, rate, before = jnp.moveaxis(block[which], -1, 0)
      real = before < done
      # A drop that is still to come adds nothing, and must not make the gradient NaN: hence a `where` before
      # the power, too.
      fell, rate = jnp.where(real, fell, 0.0), jnp.where(real, rate, 1.0)
      since = jnp.where(real, done - before, 0.0)
      paid = -jnp.expm1(-wide(p.beta) * jnp.log1p(wide(p.C) * rate ** -wide(p.gamma) * since))
      return total + (fell * paid).sum(-1), None

    start = jnp.zeros(jnp.broadcast_shapes(which.shape, jnp.shape(p.B))) + 0.0 * p.B
    drop, _ = jax.lax.scan(add, start, jnp.asarray(blocks))
    return p.E + p.A * jnp.exp(-p.alpha * x.ln_lr_sum) - p.B * drop
