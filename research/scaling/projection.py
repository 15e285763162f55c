"""Variable projection: solves for the parameters in which a law is linear instead of searching over them.

With the exponents fixed, Chinchilla's E, A and B are a linear least-squares problem (Golub & Pereyra 1973, SIAM
J. Numer. Anal. 10(2)). So a grid of starts need only run over the exponents, each with its best E, A and B.
"""

import itertools
import math

import jax
import numpy as np
from scipy import optimize

from research.scaling.laws.base import LawError, precise


def starts(problem, data, target, weights) -> np.ndarray:
  """A grid over the parameters that are not linear, each point with its best coefficients, [starts, free].

  The coefficients are those of weighted least squares, not negative. Where the residuals of `problem` are
  logarithms, the least squares are of relative residuals, which are the same to first order.

  Raises:
    LawError: no free parameter of the law is linear.
  """
  law, free = problem.law, problem.free
  linear = [name for name in free if law.parameters[name].linear]
  tied = {name for pair in problem.tied for name in pair}
  if not linear or tied & {name for name in law.parameters if law.parameters[name].linear}:
    raise LawError(f"{law.name} has no linear parameter to project on here; use starts='grid'.")
  log = problem.residuals == 'log'
  observed = np.exp(target) if log else target
  scale = np.sqrt(weights) / (observed if log else 1.0)
  others = [name for name in free if name not in linear]
  starts_of = [law.parameters[name].coordinates() for name in others]
  points = np.array(list(itertools.product(*starts_of)))
  # A column for each coefficient: the law where its coordinate is 0 (the value 1 in its units) and those of the
  # others are minus infinity (the value 0). The last column has no coefficient at all.
  grid = np.full((len(points), len(linear) + 1, len(free)), -np.inf)
  for i, name in enumerate(others):
    grid[:, :, free.index(name)] = points[:, None, i]
  for k, name in enumerate(linear):
    grid[:, k, free.index(name)] = 0.0

  @jax.jit
  @jax.vmap
  @jax.vmap
  def predict(z):
    return problem.predict(z, data)

  with precise():
    columns = np.array(predict(grid))
  z = grid[:, -1].copy()
  for point, table in zip(z, columns, strict=True):
    constant = table[-1]
    matrix = (table[:-1] - constant).T
    solved, _ = optimize.nnls(scale[:, None] * matrix, scale * (observed - constant))
    for name, value in zip(linear, solved, strict=True):
      low, high = law.parameters[name].low, law.parameters[name].high
      point[free.index(name)] = np.clip(math.log(max(value, 1e-300)), low, high)
  return z
