"""Fits a law to rows: every distinct minimum, its curvature, and an error where rows do not determine it."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import curvature, held, projection, solver
from research.scaling.fit_data import make_data
from research.scaling.fitted import Fit, Minimum, NotIdentifiable, cure, near_zero, unidentified
from research.scaling.laws.base import Law, LawError
from research.scaling.objective import LOSSES, TINY, Problem

# With more rows than this, all starts run on a random subset, and only the distinct minima run on all rows.
SUBSET = 4096
# A smaller grid, which remains where most parameters are fixed, can miss the optimum.
FEWEST_STARTS = 64
# The chi-squared of one degree of freedom that 5% exceed.
CHI_SQUARED_5 = 3.84
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
    law: what to fit.
    inputs: an array [rows] for each input of the law.
    loss: the law's output in each row, [rows].
    weights: of the rows [rows]; None for ones.
    robust: rho, 'huber' (quadratic within `delta`), 'l1' or 'l2'; None for that of the law, `law.robust`.
    delta, tau: of rho, see `objective.rho`. A `tau` other than 1/2 makes it asymmetric.
    residuals: 'log' (ln predicted - ln observed) or 'linear' (predicted - observed); None for those of the law.
    fixed: natural values of the parameters that do not move.
    tied: the parameters that equal another one, name -> name.
    starts: 'grid' for that of the law; 'projected' for a grid over the parameters that are not linear, where
      the others are solved for (`projection.starts`); or natural values, an array [starts] of each parameter.
    check: whether to check that the rows determine the parameters.

  Raises:
    LawError: an input is missing, a value is impossible, or an option is unknown.
    NotIdentifiable: the rows do not determine the parameters; see `not_determined`.
  """
  robust = law.robust if robust is None else robust
  residuals = law.residuals if residuals is None else residuals
  if check:
    held.check(law, fixed, tied, loss)
  problem = Problem(
    law, robust, residuals, _pairs(law, fixed or {}), _pairs(law, tied or {}, names=True)
  )
  _check_choice('robust', robust, LOSSES)
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
  # The solver compares the law, or its logarithm, with the target.
  target = np.log(y) if residuals == 'log' else y
  z0 = _starts(problem, starts, data, target, w)
  minima = _multistart(problem, data, z0, target, w, delta, tau)
  best = minima[0]
  spread = curvature.covariance(problem, data, best[0], target, w, delta, tau)
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
    **spread,
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
  """Reasons why the rows may not determine the parameters, by the data and by profiles; empty when they do."""
  return unidentified(result) or _no_better_than_zero(result)


def _no_better_than_zero(result: Fit) -> list[str]:
  """Reasons for the parameters without which the law fits as well, by a likelihood ratio.

  With the objectives f0 without a parameter and f1 with it, n ln(f0 / f1) is chi-squared of one degree of
  freedom for normal errors, and for Laplace errors half of that: the threshold of 5% is the cautious one.
  """
  reasons = []
  if len(result.problem.free) == 1:  # nothing would be left to fit
    return reasons
  for name in near_zero(result):
    parameter = result.law.parameters[name]
    value = max(0.0, parameter.low)
    without = refit(result, fixed={**dict(result.problem.fixed), name: value})
    gain = len(result.observed) * np.log(without.objective / max(result.objective, TINY))
    if gain < CHI_SQUARED_5:
      reasons.append(
        f'{name} = {result.parameters[name]:.3g} is not told from zero: with {name} = {value:g} '
        f'the objective is {without.objective:.4g} and not {result.objective:.4g}'
      )
  return reasons


def refit(fitted: Fit, keep=slice(None), **changes) -> Fit:
  """Fits again, to some of the rows or with other options, and without the check of identifiability.

  Args:
    keep: a mask or an index of the rows to fit. `weights` of zero for the other rows give the same fit without
      another compilation, since the shapes stay.
    changes: arguments of `fit` to change.
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
  """`solver.solve`, with 'l1' as the limit of Huber losses whose delta goes to zero; objectives are its own."""
  if problem.loss != 'l1':
    return solver.solve(problem, data, z0, target, w, rows=rows, delta=delta, tau=tau, **options)
  huber = dataclasses.replace(problem, loss='huber')
  # Each delta starts where the larger one ended: L1 itself has no curvature for Newton's step.
  for delta in 10.0 ** np.arange(-2, -10, -1.0):
    solution = solver.solve(huber, data, z0, target, w, rows=rows, delta=delta, tau=tau, **options)
    z0 = solution.z
  # Huber / delta -> |r| + O(delta).
  return solution._replace(objective=solution.objective / delta)


def _multistart(problem, data, z0, target, w, delta, tau):
  """The distinct minima, best first, each (z, objective, number of starts that reached it, kind)."""
  if len(target) > SUBSET:
    part, *few = _subset(data, target, w)
    rough = minimise(problem, part, z0, *few, None, delta, tau)
    # All rows change a minimum of the subset by little: one that is not among the best eight is not
    # expected to become best.
    groups = _distinct(problem, part, rough, len(z0))[:8]
    z0, counts = np.stack([g[0] for g in groups]), np.array([g[2] for g in groups])
  else:
    counts = np.ones(len(z0), int)
  return _distinct(problem, data, minimise(problem, data, z0, target, w, None, delta, tau), counts)


def _subset(data, target, w):
  """At most SUBSET rows of (data, target, weights), drawn at random."""
  n = len(target)
  if n <= SUBSET:
    return data, target, w
  some = np.random.default_rng(0).choice(n, SUBSET, replace=False)
  x = {k: v[some] for k, v in data['x'].items()}
  return {**data, 'x': x, 'ones': data['ones'][some]}, target[some], w[some]


def _distinct(problem, data, solution: solver.Solution, counts, most: int = 24):
  """Groups the ends by their predictions, to 1e-4; at most `most` groups, each as `_multistart` says.

  Predictions are compared and not parameters: along a flat direction parameters differ and predictions do not.

  Args:
    counts: how many starts each end stands for.

  Raises:
    LawError: no start could be evaluated.
  """
  counts = np.broadcast_to(counts, solution.objective.shape)
  order = np.argsort(solution.objective, kind='stable')
  # A start where the law is negative has no objective.
  order = order[np.isfinite(solution.objective[order])]
  if len(order) == 0:
    raise LawError(f'{problem.law.name}: no start could be evaluated; check the inputs.')
  predicted = solver.predictions(problem, data, solution.z[order])
  if problem.residuals == 'log':
    predicted = np.log(np.maximum(predicted, 1e-300))
  else:
    predicted = predicted / np.exp(data['center']['output'])
  remaining, groups = np.ones(len(order), bool), []
  while remaining.any() and len(groups) < most:
    i = int(np.argmax(remaining))  # the best that is not in a group yet
    same = remaining & (np.abs(predicted - predicted[i]).max(1) < 1e-4)
    k = order[i]
    kind = _kind(problem, solution, k)
    groups.append((solution.z[k], solution.objective[k], int(counts[order[same]].sum()), kind))
    remaining &= ~same
  return groups


def _kind(problem, solution: solver.Solution, k: int, max_steps: int = 300) -> str:
  """The `Minimum.kind` of end k."""
  low, high = problem.bounds()
  z, hessian = solution.z[k], solution.hessian[k]
  if solution.steps[k] >= max_steps or not np.isfinite(hessian).all():
    return 'unconverged'
  if ((z - low < 1e-6) | (high - z < 1e-6)).any():
    return 'bound'
  # Scaled to a unit diagonal, so that the sign of rounding in a flat direction does not decide.
  scale = np.sqrt(np.maximum(np.abs(np.diag(hessian)), TINY))
  eigenvalues = np.linalg.eigvalsh(hessian / np.outer(scale, scale))
  return 'saddle' if eigenvalues[0] < -1e-6 else 'minimum'


def _starts(problem, starts, data, target, w) -> np.ndarray:
  """The free coordinates of every start, [starts, free]; `starts` as in `fit`."""
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
  # Starts that differ only in fixed or tied parameters are the same start.
  grid = np.unique(np.round(grid, 12), axis=0)
  return _enough(grid) if isinstance(starts, str) else grid


def _enough(grid: np.ndarray) -> np.ndarray:
  """The grid with random starts added up to FEWEST_STARTS.

  A grid collapses where parameters are fixed. The added starts lie within its range, half an e-fold wider on
  each side.
  """
  missing = FEWEST_STARTS - len(grid)
  if missing <= 0:
    return grid
  low, high = grid.min(0) - 0.5, grid.max(0) + 0.5
  return np.concatenate(
    [grid, np.random.default_rng(0).uniform(low, high, (missing, grid.shape[1]))]
  )


def _pairs(law, mapping, names=False) -> tuple:
  """The items of `fixed`, or with `names` of `tied`, sorted: a Problem must be hashable for jax.jit."""
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
