"""Fitting a law to rows: every distinct minimum, its curvature, and a refusal where rows cannot tell."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from research.core.errors import did_you_mean
from research.scaling import projection, solver
from research.scaling.fit_data import make_data
from research.scaling.fitted import Fit, Minimum, NotIdentifiable, cure, near_zero, unidentified
from research.scaling.laws.base import Law, LawError, precise

# Above this many rows the starts are run on a random subset, and only distinct minima on all rows.
SUBSET = 4096
# A grid of fewer starts than this, as is left where parameters are held, can miss the optimum.
FEWEST_STARTS = 64
LOSS_NAMES = ('huber', 'l1', 'l2')
RESIDUALS = ('log', 'linear')
STARTS = ('grid', 'projected')


def fit(
  law: Law,
  inputs: Mapping[str, np.ndarray],
  loss: np.ndarray,
  *,
  weights: np.ndarray | None = None,
  robust: str | None = None,
  delta: float = 1e-3,
  tau: float = 0.5,
  residuals: str | None = None,
  fixed: Mapping[str, float] | None = None,
  tied: Mapping[str, str] | None = None,
  starts: Mapping[str, np.ndarray] | str = 'grid',
  check: bool = True,
) -> Fit:
  """Minimises sum_i weights_i rho(residual_i) from every start.

  Args:
    law: what to fit; `inputs` holds an array [rows] for each of its inputs, `loss` [rows] what it predicts.
    robust: 'huber' (quadratic within `delta`), 'l1' or 'l2'; None: the law's own, `law.robust`. `tau` other
      than 1/2 makes it asymmetric.
    residuals: 'log' (of predicted over observed) or 'linear' (predicted minus observed); None: the law's own.
    fixed: parameters held at a natural value; tied: parameters that take another's value.
    starts: 'grid' (the law's own), 'projected' (of the parameters that are not linear; the others are solved
      for: fewer starts, `projection.py`), or natural values, an array [starts] for every parameter.
    check: raise NotIdentifiable where the rows cannot tell the parameters (see `unidentified`).
  """
  robust = law.robust if robust is None else robust
  residuals = law.residuals if residuals is None else residuals
  problem = solver.Problem(
    law, robust, residuals, _pairs(law, fixed or {}), _pairs(law, tied or {}, names=True)
  )
  _check_choice('robust', robust, LOSS_NAMES)
  _check_choice('residuals', residuals, RESIDUALS)
  if residuals == 'log' and law.output in law.plain:
    raise LawError(
      f"{law.name}: {law.output} may be zero or negative, so residuals must be 'linear'."
    )
  data, y = make_data(law, inputs, loss)
  w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
  if len(y) < len(problem.free):
    few = f'{len(y)} rows for {len(problem.free)} parameters'
    raise NotIdentifiable(law, [few], 'Add runs, or fix or tie parameters.')
  target = np.log(y) if residuals == 'log' else y
  z0 = _starts(problem, starts, data, target, w)
  minima = _multistart(problem, data, z0, target, w, delta, tau)
  best = minima[0]
  curvature = _covariance(problem, data, best[0], target, w, delta, tau)
  result = Fit(
    problem=problem,
    parameters=_floats(problem.values(best[0], data['center'], np.exp)),
    objective=float(best[1]),
    minima=tuple(
      Minimum(_floats(problem.values(z, data['center'], np.exp)), float(f), n, kind)
      for z, f, n, kind in minima
    ),
    starts=len(z0),
    z=best[0],
    **curvature,
    data=data,
    observed=y,
    weights=w,
    delta=delta,
    tau=tau,
  )
  if check and (reasons := not_determined(result)):
    raise NotIdentifiable(law, reasons, cure(result))
  return result


def not_determined(result: Fit) -> list[str]:
  """Why the rows may not determine the parameters, by the data and by profiles; empty when they do."""
  return unidentified(result) or _no_better_than_zero(result)


def _no_better_than_zero(result: Fit) -> list[str]:
  """The parameters without which the rows are fitted as well, by the likelihood ratio of a profile.

  n ln(f0 / f1) of the objectives without and with the parameter is chi-squared of one degree for normal
  errors, and half of that ratio for Laplace's, so that 3.84 is the cautious threshold of 5%.
  """
  reasons = []
  for name in near_zero(result):
    parameter = result.law.parameters[name]
    value = max(0.0, parameter.low)
    without = refit(result, fixed={**dict(result.problem.fixed), name: value})
    gain = len(result.observed) * np.log(without.objective / max(result.objective, 1e-300))
    if gain < 3.84:
      reasons.append(
        f'{name} = {result.parameters[name]:.3g} is not told from zero: with {name} = {value:g} '
        f'the objective is {without.objective:.4g} and not {result.objective:.4g}'
      )
  return reasons


def refit(fitted: Fit, keep=slice(None), **changes) -> Fit:
  """`fitted` again on some of its rows or with other options, without the check of identifiability.

  With `weights` of zero in place of `keep` the shapes stay, and nothing is compiled again.
  """
  options = {
    'weights': fitted.weights[keep],
    'robust': fitted.problem.loss,
    'residuals': fitted.problem.residuals,
    'fixed': dict(fitted.problem.fixed),
    'tied': dict(fitted.problem.tied),
    'delta': fitted.delta,
    'tau': fitted.tau,
    **changes,
  }
  x = {name: fitted.data['x'][name][keep] for name in fitted.law.inputs}
  return fit(fitted.law, x, fitted.observed[keep], check=False, **options)


def minimise(problem, data, z0, target, w, rows, delta, tau, **options) -> solver.Solution:
  """`solver.solve`, with L1 as the limit of Huber losses whose delta vanishes."""
  if problem.loss != 'l1':
    return solver.solve(problem, data, z0, target, w, rows=rows, delta=delta, tau=tau, **options)
  huber = dataclasses.replace(problem, loss='huber')
  for delta in 10.0 ** np.arange(-2, -10, -1.0):
    solution = solver.solve(huber, data, z0, target, w, rows=rows, delta=delta, tau=tau, **options)
    z0 = solution.z
  # Huber / delta -> |r| + O(delta).
  return solution._replace(objective=solution.objective / delta)


def _multistart(problem, data, z0, target, w, delta, tau):
  """[(z, objective, starts that reached it, kind)], best first."""
  if len(target) > SUBSET:
    part, *few = _subset(data, target, w)
    rough = minimise(problem, part, z0, *few, None, delta, tau)
    groups = _distinct(problem, part, rough, len(z0))[:8]
    z0, counts = np.stack([g[0] for g in groups]), np.array([g[2] for g in groups])
  else:
    counts = np.ones(len(z0), int)
  return _distinct(problem, data, minimise(problem, data, z0, target, w, None, delta, tau), counts)


def _subset(data, target, w):
  """At most SUBSET rows of all three, drawn at random."""
  n = len(target)
  if n <= SUBSET:
    return data, target, w
  some = np.random.default_rng(0).choice(n, SUBSET, replace=False)
  x = {k: v[some] for k, v in data['x'].items()}
  return {**data, 'x': x, 'ones': data['ones'][some]}, target[some], w[some]


def _distinct(problem, data, solution: solver.Solution, counts, most: int = 24):
  """Groups what predicts the same losses: along a flat direction parameters differ, predictions do not."""
  counts = np.broadcast_to(counts, solution.objective.shape)
  order = np.argsort(solution.objective, kind='stable')
  order = order[np.isfinite(solution.objective[order])]
  if len(order) == 0:
    raise LawError(f'{problem.law.name}: no start could be evaluated; check the inputs.')
  with precise():
    predicted = np.asarray(jax.vmap(lambda z: problem.predict(z, data))(solution.z[order]))
  if problem.residuals == 'log':
    predicted = np.log(np.maximum(predicted, 1e-300))
  else:
    predicted = predicted / np.exp(data['center']['output'])
  remaining, groups = np.ones(len(order), bool), []
  while remaining.any() and len(groups) < most:
    i = int(np.argmax(remaining))
    same = remaining & (np.abs(predicted - predicted[i]).max(1) < 1e-4)
    k = order[i]
    kind = _kind(problem, solution, k)
    groups.append((solution.z[k], solution.objective[k], int(counts[order[same]].sum()), kind))
    remaining &= ~same
  return groups


def _kind(problem, solution: solver.Solution, k: int, max_steps: int = 300) -> str:
  low, high = problem.bounds()
  z, hessian = solution.z[k], solution.hessian[k]
  if solution.steps[k] >= max_steps or not np.isfinite(hessian).all():
    return 'unconverged'
  if ((z - low < 1e-6) | (high - z < 1e-6)).any():
    return 'bound'
  scale = np.sqrt(np.maximum(np.abs(np.diag(hessian)), 1e-300))
  eigenvalues = np.linalg.eigvalsh(hessian / np.outer(scale, scale))
  return 'saddle' if eigenvalues[0] < -1e-6 else 'minimum'


def _covariance(problem, data, z, target, w, delta, tau) -> dict:
  """Sandwich covariance, condition number and correlations of the free coordinates."""
  with precise():
    predict = lambda z: problem.predict(z, data)
    m, jacobian = np.asarray(predict(z)), np.asarray(jax.jacfwd(predict)(np.asarray(z)))
  if problem.residuals == 'log':
    r, jacobian = np.log(m) - target, jacobian / m[:, None]
  else:
    r = m - target
  n, p = jacobian.shape
  if problem.loss == 'l2':
    bread, meat = w, (w * r) ** 2
  else:
    # The expected curvature of a robust loss is the density of residuals near zero, which the few rows
    # within delta estimate badly: take it from the spread of all residuals, as for a normal error.
    spread = 1.4826 * np.median(np.abs(r)) + 1e-300
    width = max(delta if problem.loss == 'huber' else 0.0, 0.3 * spread)
    slope = np.clip(r, -width, width)
    bread, meat = w * (np.abs(r) <= width), (w * slope) ** 2
    if bread.sum() < 2 * p:
      bread = w * np.minimum(1.0, width / np.maximum(np.abs(r), 1e-300))
  information = jacobian.T @ (jacobian * bread[:, None])
  scale = np.sqrt(np.maximum(np.diag(information), 1e-300))
  condition = float(np.linalg.cond(information / np.outer(scale, scale)))
  inverse = np.linalg.pinv(information / np.outer(scale, scale)) / np.outer(scale, scale)
  covariance = inverse @ (jacobian.T @ (jacobian * meat[:, None])) @ inverse * n / max(n - p, 1)
  sd = np.sqrt(np.maximum(np.diag(inverse), 1e-300))
  return {
    'covariance': covariance,
    'condition': condition,
    'correlations': inverse / np.outer(sd, sd),
  }


def _starts(problem, starts, data, target, w) -> np.ndarray:
  """[starts, free] coordinates."""
  law = problem.law
  if isinstance(starts, str):
    _check_choice('starts', starts, STARTS)
  if isinstance(starts, str) and starts == 'projected':
    return projection.starts(problem, *_subset(data, target, w))
  if isinstance(starts, str):
    z = law.starts()
  else:
    law.check_names(starts)
    if missing := [name for name in law.parameters if name not in starts]:
      raise LawError(f'starts of {law.name} lack {", ".join(missing)}.')
    values = {k: np.asarray(v, np.float64) for k, v in starts.items()}
    z = law.coordinates(values, data['center'])
  grid = np.stack([np.atleast_1d(z[name]) for name in problem.free], axis=1)
  grid = np.unique(np.round(grid, 12), axis=0)
  return _enough(grid) if isinstance(starts, str) else grid


def _enough(grid: np.ndarray) -> np.ndarray:
  """At least FEWEST_STARTS: a grid that has collapsed, since parameters are held, is filled up at random.

  The points added lie within the grid's range, half an e-fold wider on each side.
  """
  missing = FEWEST_STARTS - len(grid)
  if missing <= 0:
    return grid
  low, high = grid.min(0) - 0.5, grid.max(0) + 0.5
  return np.concatenate(
    [grid, np.random.default_rng(0).uniform(low, high, (missing, grid.shape[1]))]
  )


def _pairs(law, mapping, names=False) -> tuple:
  law.check_names(mapping)
  if names:
    law.check_names(mapping.values())
  return tuple((k, v if names else float(v)) for k, v in sorted(mapping.items()))


def _check_choice(name, value, options):
  if value not in options:
    raise LawError(
      f'{name}={value!r} is not one of {", ".join(options)}.{did_you_mean(value, options)}'
    )


def _floats(values) -> dict[str, float]:
  return {name: float(v) for name, v in values.items()}
