"""Laws of reinforcement: the over-optimisation of a reward model, and rewards against compute."""

import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.scaling.laws.base import Law, Parameter, exponent


def kl_of_best_of_n(n) -> np.ndarray:
  """KL divergence of best-of-n samples from the policy that drew them, in nats: ln n - (n - 1) / n.

  It is exact for continuous rewards (Stiennon et al. 2020, appendix G.3; Gao et al. 2022, section 2).
  """
  n = np.asarray(n, np.float64)
  if not (np.isfinite(n) & (n >= 1)).all():
    raise UserError('Best of n: n must be 1 or more.')
  return np.log(n) - (n - 1) / n


class _Overoptimization(Law):
  """Gold reward, less that of the initial policy, against d = sqrt(KL); KL may be 0 and the reward negative."""

  source = 'Gao et al. 2022, arXiv:2210.10760, section 3.1'
  output = 'gold_reward'
  inputs = ('kl',)
  zeros = ('kl',)
  plain = ('gold_reward',)
  robust = 'l2'
  residuals = 'linear'


class BestOfNReward(_Overoptimization):
  """Gold reward of best-of-n against a proxy: d (a - b d), highest at d = a / (2 b) (Gao et al. 2022)."""

  form = 'd (a - b d), d = sqrt(KL)'
  a = Parameter('gain per unit of distance at first', {'output': 1, 'kl': -0.5}, (0.5, 2.0, 5.0))
  b = Parameter('how over-optimisation eats it', {'output': 1, 'kl': -1}, (0.1, 0.5, 2.0))

  def predict(self, p, x):
    d = jnp.sqrt(x.kl)
    return d * (p.a - p.b * d)


class ReinforcementReward(_Overoptimization):
  """Gold reward of reinforcement against a proxy: d (a - b ln d) (Gao et al. 2022).

  It is highest at ln d = a / b - 1. The logarithm ties `a` to the unit of KL, which is nats.
  """

  form = 'd (a - b ln d), d = sqrt(KL)'
  a = Parameter('gain per unit of distance at d = 1', {'output': 1, 'kl': -0.5}, (0.5, 2.0, 5.0))
  b = Parameter('how over-optimisation eats it', {'output': 1, 'kl': -0.5}, (0.1, 0.5, 2.0))

  def predict(self, p, x):
    # d ln d is 0 at d = 0, since ln_kl is finite there (LN_ZERO).
    return jnp.sqrt(x.kl) * (p.a - p.b * x.ln_kl / 2)


class RewardOfCompute(Law):
  """Pass rate or reward against the compute of reinforcement: a sigmoid in ln C (Khatri et al. 2025, ScaleRL).

  R_0 + (A - R_0) / (1 + (C_mid / C)^B). Compute may have any unit; the published C_mid is in GPU-hours. Fix
  `R_0` at the reward before training where that was measured.
  """

  source = 'Khatri et al. 2025, arXiv:2510.13786, equation 1'
  form = 'R_0 + (A - R_0) / (1 + (C_mid / C)^B)'
  output = 'reward'
  inputs = ('flops',)
  plain = ('reward',)
  robust = 'l2'
  residuals = 'linear'
  R_0 = Parameter('reward before', {'output': 1}, (0.2, 0.8), positive=False, low=-5.0, high=5.0)
  A = Parameter(
    'reward in the limit', {'output': 1}, (0.9, 1.5), positive=False, low=-5.0, high=20.0
  )
  B = exponent('steepness', (0.5, 1.0, 2.0), high=20.0)
  C_mid = Parameter('compute half-way', {'flops': 1}, (0.1, 1.0, 10.0))

  def predict(self, p, x):
    return p.R_0 + (p.A - p.R_0) / (1 + jnp.exp(p.B * (jnp.log(p.C_mid) - x.ln_flops)))
