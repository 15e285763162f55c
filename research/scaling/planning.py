"""What to train: the optimum for a budget, isoloss curves, inference-aware optima, and the cost of a miss."""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.cost import SIX_ND, TWO_ND, Cost
from research.scaling.laws.base import Law, LawError, precise
from research.scaling.solver import padded_size


def optimum(law: Law, parameters: Mapping, flops, cost: Cost = SIX_ND):
  """(N*, D*, L*) that minimise the law's loss at `flops` training FLOPs.

  NaN where the loss falls all the way to N = 1 or D = 1, so that the law has no optimum.

  Args:
    parameters: natural values by name. They broadcast against `flops`: values [replicates, 1] and budgets
      [budgets] give results [replicates, budgets].
    cost: C as a function of N and D.

  Raises:
    LawError: the law is not of params and tokens, or has no such parameter.
  """
  if not {'params', 'tokens'} <= set(law.inputs):
    raise LawError(f'{law.name} is not a law of params and tokens, so a budget has no split.')
  law.check_names(parameters)
  parameters = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
  flops = np.asarray(flops, np.float64)
  with precise():
    line = float(np.log(cost.k)), cost.p, cost.constant
    ln_n = _optimal_size(law, parameters, np.log(flops), *line)
  params = np.exp(ln_n)
  tokens = cost.tokens(params, flops)
  return params, tokens, law(parameters, params=params, tokens=tokens)


def _optimal_size(law, parameters, ln_c, *line) -> np.ndarray:
  """ln N* at every ln C, of the shape to which the parameters and `ln_c` broadcast."""
  shape = np.broadcast_shapes(ln_c.shape, *(value.shape for value in parameters.values()))
  count = math.prod(shape)
  # As rows of a few lengths, so that most calls share a compiled program.
  length = padded_size(count, 256, 16)

  def row(values):
    return np.resize(np.broadcast_to(values, shape), length)  # repeats them

  rows = {name: row(values) for name, values in parameters.items()}
  ln_n = np.asarray(_bisect(law, rows, row(ln_c), *line))
  return ln_n[:count].reshape(shape)


@functools.partial(jax.jit, static_argnames='law')
def _bisect(law, parameters, ln_c, ln_k, p, constant):
  """ln N* [n] at ln C [n], where the derivative of the loss along C = (k N^p + constant) D is zero."""

  def loss(ln_n, parameters, ln_c):
    ln_d = ln_c - jnp.log(jnp.exp(ln_k + p * ln_n) + constant)
    x = {'params': jnp.exp(ln_n), 'tokens': jnp.exp(ln_d), 'ln_params': ln_n, 'ln_tokens': ln_d}
    return law.predict(types.SimpleNamespace(**parameters), types.SimpleNamespace(**x))

  slope = jax.vmap(jax.grad(loss))
  # From one parameter to as many as leave one token.
  low = jnp.zeros_like(ln_c)
  high = (jnp.log(jnp.maximum(jnp.exp(ln_c) - constant, jnp.exp(ln_k))) - ln_k) / p
  inside = (slope(low, parameters, ln_c) < 0) & (slope(high, parameters, ln_c) > 0)

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    falling = slope(middle, parameters, ln_c) < 0
    return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

  # 60 halvings of an interval of at most 100 e-folds are exact in float64. A bisection, unlike Newton's method,
  # needs no start and does not leave the interval.
  low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
  return jnp.where(inside, (low + high) / 2, jnp.nan)


def isoloss(law: Law, parameters: Mapping, loss: float, params) -> np.ndarray:
  """Tokens D at which models of `params` parameters [sizes] reach `loss`; inf where no D does."""
  params = np.atleast_1d(np.asarray(params, np.float64))
  low = np.zeros_like(params)
  high = np.full_like(params, np.log(1e30))

  def loss_at(ln_d):
    return law(parameters, params=params, tokens=np.exp(ln_d))

  reachable = loss_at(high) <= loss
  for _ in range(100):
    middle = (low + high) / 2
    above = loss_at(middle) > loss
    low = np.where(above, middle, low)
    high = np.where(above, high, middle)
  return np.where(reachable, np.exp(high), np.inf)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A model to train and its cost."""

  params: float
  tokens: float
  loss: float
  training: float  # FLOPs
  inference: float  # FLOPs, over the model's life

  @property
  def tokens_per_param(self) -> float:
    return self.tokens / self.params


def inference_aware(
  law: Law,
  parameters: Mapping,
  loss: float,
  inference_tokens: float,
  cost: Cost = SIX_ND,
  inference_cost: Cost = TWO_ND,
) -> Plan:
  """The cheapest model of a given loss over its life (Sardana et al. 2024, arXiv:2401.00448, equation 3).

  It minimises C(N, D) + C_inference(N, D_inference) subject to L(N, D) = `loss`. The more inference, the
  smaller the model and the longer its training.

  Args:
    inference_tokens: D_inference, the tokens that the model generates in its life.
    cost: of training.
    inference_cost: of inference. `fit_cost` fits one to a family's real counts (`model.counts.count_decoding`),
      where a head that does not grow with N, and attention to a long context, cost more than 2 N.

  Raises:
    LawError: the law cannot reach the loss.
  """

  def total(n, d):
    return cost.flops(n, d) + inference_cost.flops(n, inference_tokens)

  grid = np.geomspace(1e3, 1e16, 4001)
  # The minimum is unique, so that each round can zoom in on the neighbours of the grid's best.
  for _ in range(4):
    tokens = isoloss(law, parameters, loss, grid)
    k = int(np.argmin(np.where(np.isfinite(tokens), total(grid, tokens), np.inf)))
    if not np.isfinite(tokens[k]):
      raise LawError(f'{law.name} with these parameters never reaches a loss of {loss:g}.')
    grid = np.geomspace(grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)], 401)
  n = grid[np.argmin(total(grid, isoloss(law, parameters, loss, grid)))]
  d = float(isoloss(law, parameters, loss, n)[0])
  inference = float(inference_cost.flops(n, inference_tokens))
  return Plan(float(n), d, float(loss), float(cost.flops(n, d)), inference)


def waste(law: Law, parameters: Mapping, params, tokens, cost: Cost = SIX_ND) -> np.ndarray:
  """The share of a run's training compute that an optimal run of the same loss would save.

  It is 0 at the optimum; 0.3 means that 70% of the compute would have been enough. `params` and `tokens`
  broadcast.
  """
  reached = law(parameters, params=params, tokens=tokens)
  spent = np.asarray(cost.flops(params, tokens), np.float64)
  high = np.log(spent)
  low = high - 60
  for _ in range(80):
    middle = (low + high) / 2
    worse = optimum(law, parameters, np.exp(middle), cost)[2] > reached
    low = np.where(worse, middle, low)
    high = np.where(worse, high, middle)
  return np.maximum(1 - np.exp(high) / spent, 0.0)
