"""The objective of a fit: a law's residuals under a robust loss, with their first and second derivatives."""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law

TINY = 1e-300  # instead of zero in denominators and logarithms
LOSSES = ('huber', 'l1', 'l2')


@dataclasses.dataclass(frozen=True)
class Problem:
  """The objective sum_i w_i rho(r_i), where r_i is the log or linear residual of `law` at row i.

  Attributes:
    loss: rho, one of `LOSSES`.
    residuals: 'log' (ln predicted - ln observed) or 'linear' (predicted - observed).
    fixed: (name, natural value) of the parameters that do not move.
    tied: (name, other name) of the parameters that equal another one. All the others are free.
  """

  law: Law
  loss: str = 'huber'
  residuals: str = 'log'
  fixed: tuple[tuple[str, float], ...] = ()
  tied: tuple[tuple[str, str], ...] = ()

  @property
  def free(self) -> tuple[str, ...]:
    """The names of the parameters that the fit moves, in the law's order."""
    constrained = {name for name, _ in self.fixed} | {name for name, _ in self.tied}
    return tuple(name for name in self.law.parameters if name not in constrained)

  def values(self, z, center, exp=jnp.exp) -> dict:
    """Every parameter's natural value [...] at free coordinates `z` [free, ...]."""
    return self.law.natural(
      dict(zip(self.free, z, strict=True)), center, exp, self.fixed, self.tied
    )

  def predict(self, z, data):
    """The law's predictions [rows] at free coordinates `z` [free]."""
    values = self.values(z, data['center'])
    # A product with a column of ones spreads a parameter over the rows. The gradient of a product is a dot,
    # which XLA vectorises on CPUs; that of a broadcast is a sum, which it does not (2x on the Hessian).
    values = {name: data['ones'] @ jnp.reshape(v, 1) for name, v in values.items()}
    return self.law.predict(types.SimpleNamespace(**values), types.SimpleNamespace(**data['x']))

  def with_slopes(self, z, data):
    """The predictions [rows] at free coordinates `z` [free], and their derivatives [rows, free]."""
    # Few parameters and many rows: forward mode.
    return self.predict(z, data), jax.jacfwd(self.predict)(z, data)

  def bounds(self) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) values of the free coordinates, [free] each."""
    parameters = [self.law.parameters[name] for name in self.free]
    return np.array([p.low for p in parameters]), np.array([p.high for p in parameters])


def rho(loss: str, r, delta, tau):
  """(rho, rho', rho'', IRLS weight) of residuals `r`, each of its shape.

  Huber's rho is r^2/2 within delta and delta (|r| - delta/2) outside; that of 'l2' is r^2/2. `law_fit.minimise`
  solves 'l1' as Huber with a delta that goes to zero. A `tau` other than 1/2 weighs r < 0 (a prediction below
  the data) by 2 tau and r > 0 by 2 (1 - tau): the minimum is then an expectile or, with 'l1', a quantile.
  """
  side = jnp.where(r < 0, 2 * tau, 2 * (1 - tau))
  if loss == 'l2':
    return side * r * r / 2, side * r, side, side
  size = jnp.abs(r)
  inside = size <= delta
  value = jnp.where(inside, r * r / 2, delta * (size - delta / 2))
  slope = jnp.where(inside, r, delta * jnp.sign(r))
  weight = jnp.where(inside, 1.0, delta / jnp.maximum(size, TINY))
  return side * value, side * slope, side * inside, side * weight


class Point(NamedTuple):
  """The objective and its derivatives at one z."""

  f: jax.Array
  gradient: jax.Array
  newton: jax.Array  # the Hessian
  irls: jax.Array  # J^T W J, positive semidefinite


def expand(problem: Problem, z, y, w, data, delta, tau) -> Point:
  """The value and derivatives of sum_i w_i rho(r_i).

  With m the prediction and J its Jacobian, the Hessian is J^T diag(w rho'') J + sum_i w_i rho'_i d2 m_i. Here
  `curve` is w rho'', `force` is w rho', and `bend` is the last term.

  Args:
    y: the observed loss [rows], or its logarithm where the residuals are logarithms.
    w: weights [rows].
  """

  m, jacobian = problem.with_slopes(z, data)
  log = problem.residuals == 'log'
  safe = jnp.maximum(m, TINY)
  r = jnp.log(safe) - y if log else m - y
  value, slope, curve, weight = rho(problem.loss, r, delta, tau)
  force = w * slope
  curve, pull = w * curve, force
  if log:  # d2 ln m = d2 m / m - (d ln m)(d ln m)^T
    jacobian, curve, pull = jacobian / safe[:, None], curve - force, force / safe
  # A constant, so that `bend` has the second derivative of the law alone.
  pull = jax.lax.stop_gradient(pull)

  def pulled(z):
    return pull @ problem.predict(z, data)

  def square(c):
    return jnp.einsum('ni,nj->ij', jacobian * c[:, None], jacobian)

  bend = jax.jacfwd(jax.grad(pulled))(z)
  # A law that goes negative has no log residual there: such a step is refused, such a start dropped.
  total = jnp.where(log & (m <= 0).any(), jnp.inf, w @ value)
  return Point(total, force @ jacobian, square(curve) + bend, square(w * weight))
