"""The curvature of a fit at its minimum: covariance, condition number and correlations of the parameters."""

import numpy as np

from research.scaling import solver
from research.scaling.objective import TINY


def covariance(problem, data, z, target, w, delta, tau) -> dict:
  """Sandwich covariance, condition number and correlations of the free coordinates.

  The sandwich is H^-1 (J^T diag(meat) J) H^-1 with H = J^T diag(bread) J (Huber 1967; White 1980). It holds for
  errors of any size in each row, since the meat is of the residuals themselves.
  """
  m, jacobian = solver.with_slopes(problem, data, z)
  if problem.residuals == 'log':
    r, jacobian = np.log(m) - target, jacobian / m[:, None]
  else:
    r = m - target
  n, p = jacobian.shape
  if problem.loss == 'l2':
    bread, meat = w, (w * r) ** 2
  else:
    # The expected curvature of a robust loss is the density of residuals near zero. The few rows within delta
    # estimate it badly, so that the spread of all residuals widens the window, as for a normal error.
    spread = 1.4826 * np.median(np.abs(r)) + TINY  # 1.4826 MAD is a normal's standard deviation
    width = max(delta if problem.loss == 'huber' else 0.0, 0.3 * spread)
    slope = np.clip(r, -width, width)
    bread, meat = w * (np.abs(r) <= width), (w * slope) ** 2
    if bread.sum() < 2 * p:
      # Too few rows within the window to determine p coordinates: the IRLS weights are never zero.
      bread = w * np.minimum(1.0, width / np.maximum(np.abs(r), TINY))
  information = jacobian.T @ (jacobian * bread[:, None])
  # Scaled to a unit diagonal: the condition number then tells of trade-offs and not of units.
  scale = np.sqrt(np.maximum(np.diag(information), TINY))
  condition = float(np.linalg.cond(information / np.outer(scale, scale)))
  inverse = np.linalg.pinv(information / np.outer(scale, scale)) / np.outer(scale, scale)
  covariance = inverse @ (jacobian.T @ (jacobian * meat[:, None])) @ inverse * n / max(n - p, 1)
  sd = np.sqrt(np.maximum(np.diag(inverse), TINY))
  return {
    'covariance': covariance,
    'condition': condition,
    'correlations': inverse / np.outer(sd, sd),
  }
