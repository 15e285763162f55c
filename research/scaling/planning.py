"""What to train: the optimum for a budget, isoloss and inference-aware optima, the price of missing it."""

import dataclasses
import functools
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law, LawError


@dataclasses.dataclass(frozen=True)
class Cost:
  """Training FLOPs C(N, D) = k N^p D. The default is the usual 6 N D; other conventions are fitted "
  "to rows."""

  k: float = 6.0
  p: float = 1.0
  worst: float = 0.0  # largest relative deviation of the rows it was fitted to

  def flops(self, params, tokens):
    return self.k * np.asarray(params, np.float64) ** self.p * tokens

  def tokens(self, params, flops):
    return np.asarray(flops, np.float64) / (self.k * np.asarray(params, np.float64) ** self.p)

  def params(self, tokens, flops):
    return (np.asarray(flops, np.float64) / (self.k * tokens)) ** (1 / self.p)

  def __str__(self) -> str:
    if self.p == 1.0:
      return f'C = {self.k:.4g} N D'
    return f'C = {self.k:.4g} N^{self.p:.4f} D (rows deviate by up to {self.worst:.1%})'


SIX_ND = Cost()


def fit_cost(params, tokens, flops) -> Cost:
  """The rows' own FLOP convention as k N^p D: exactly 6 N D where they say so."""
  per_token = np.log(np.asarray(flops) / np.asarray(tokens))
  n = np.log(np.asarray(params))
  if np.allclose(per_token - n, np.log(6.0), atol=1e-6):
    return Cost()
  if np.ptp(n) < 1e-9:
    return Cost(float(np.exp((per_token - n).mean())), 1.0)
  if np.ptp(per_token - n) < 0.02:  # proportional to N D up to the rounding of figures
    k = float(np.exp(np.median(per_token - n)))
    k = 6.0 if abs(k / 6 - 1) < 0.01 else k
    return Cost(k, 1.0, float(np.abs(np.expm1(per_token - n - np.log(k))).max()))
  p, ln_k = np.polyfit(n, per_token, 1)
  worst = float(np.abs(np.expm1(per_token - p * n - ln_k)).max())
  return Cost(float(np.exp(ln_k)), float(p), worst)


def optimum(law: Law, parameters: Mapping, flops, cost: Cost = SIX_ND):
  """(N*, D*, L*) that minimise the law's loss at `flops` training FLOPs.

  `parameters` and `flops` broadcast: values [replicates, 1] and budgets [budgets] give [replicates, budgets].
  NaN where the loss falls all the way to N = 1 or D = 1: the law has no optimum there.
  """
  if not {'params', 'tokens'} <= set(law.inputs):
    raise LawError(f'{law.name} is not a law of params and tokens, so a budget has no split.')
  law.check_names(parameters)
  parameters = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
  flops = np.asarray(flops, np.float64)
  with jax.enable_x64(True):
    ln_n = np.asarray(_bisect(law, parameters, np.log(flops), float(np.log(cost.k)), cost.p))
  params = np.exp(ln_n)
  tokens = cost.tokens(params, flops)
  return params, tokens, law(parameters, params=params, tokens=tokens)


@functools.partial(jax.jit, static_argnames='law')
def _bisect(law, parameters, ln_c, ln_k, p):
  def loss(ln_n, parameters, ln_c):
    ln_d = ln_c - ln_k - p * ln_n
    x = {'params': jnp.exp(ln_n), 'tokens': jnp.exp(ln_d), 'ln_params': ln_n, 'ln_tokens': ln_d}
    return law.predict(types.SimpleNamespace(**parameters), types.SimpleNamespace(**x))

  shape = jnp.broadcast_shapes(jnp.shape(ln_c), *(jnp.shape(v) for v in parameters.values()))
  parameters = {k: jnp.broadcast_to(v, shape).ravel() for k, v in parameters.items()}
  ln_c = jnp.broadcast_to(ln_c, shape).ravel()
  slope = jax.vmap(jax.grad(loss))
  low, high = jnp.zeros_like(ln_c), (ln_c - ln_k) / p
  inside = (slope(low, parameters, ln_c) < 0) & (slope(high, parameters, ln_c) > 0)

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    falling = slope(middle, parameters, ln_c) < 0
    return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

  low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
  return jnp.where(inside, (low + high) / 2, jnp.nan).reshape(shape)
