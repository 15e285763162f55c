"""Whole loss curves under any learning-rate schedule."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law, Parameter, coefficient, exponent


@dataclasses.dataclass(frozen=True, eq=False)
class MultiPower(Law):
  """L(t) = E + A (S(t) + S_warm)^-alpha - LD(t), S the sum of learning rates (Luo et al. 2025, equation 1).

  LD(t) = B sum_k (lr_{k-1} - lr_k) G(lr_k^-gamma S_k(t)), G(x) = 1 - (C x + 1)^-beta, over the steps k <= t
  at which the rate fell; S_k(t) sums the rates from k to t. `schedules`: the learning rates of each run's
  main part, after warm-up, an array [steps] each; `warm`: the sum of the warm-up's rates, one for all.
  Drops are gathered into at most `knots` per schedule. Make rows with `points`.
  """

  schedules: Sequence[np.ndarray]
  warm: float = 0.0
  knots: int = 128

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
    pad = lambda d: np.concatenate([d, np.tile([0.0, 1.0, np.inf], (longest - len(d), 1))])
    object.__setattr__(self, 'drops', np.stack([pad(d) for d in lists]))

  def _drops(self, lr) -> np.ndarray:
    """[drops, 3]: how far the rate fell, where it then was, and the sum of rates before that step."""
    fell = -np.diff(lr)
    at = np.flatnonzero(fell != 0) + 1
    if len(at) == 0:
      return np.array([[0.0, 1.0, np.inf]])
    before = np.cumsum(lr)[at - 1]
    groups = np.array_split(np.arange(len(at)), min(self.knots, len(at)))
    total = [fell[at[g] - 1].sum() for g in groups]
    return np.array(
      [[d, lr[at[g]].mean(), before[g].mean()] for d, g in zip(total, groups, strict=True)]
    )

  def points(self, schedule: int, steps) -> dict[str, np.ndarray]:
    """Inputs for the losses of run `schedule` after `steps` steps of its main part (counted from 1)."""
    done = np.cumsum(self.schedules[schedule])[np.asarray(steps) - 1]
    return {
      'lr_sum': done + self.warm,
      'lr_main': done,
      'schedule': np.full(len(done), float(schedule)),
    }

  def predict(self, p, x):
    drops = jnp.asarray(self.drops)[jnp.asarray(x.schedule).astype(int)]
    fell, rate, before = drops[..., 0], drops[..., 1], drops[..., 2]
    wide = lambda v: jnp.asarray(v)[..., None]
    since = jnp.maximum(wide(x.lr_main) - before, 0.0)
    paid = -jnp.expm1(-wide(p.beta) * jnp.log1p(wide(p.C) * rate ** -wide(p.gamma) * since))
    drop = jnp.where(jnp.isfinite(before), fell * paid, 0.0).sum(-1)
    return p.E + p.A * jnp.exp(-p.alpha * x.ln_lr_sum) - p.B * drop
