"""A fitted law: its minima, its curvature, and whether the rows determine its parameters."""

import dataclasses

import numpy as np

from research.core.errors import UserError
from research.scaling import objective, solver
from research.scaling.laws.base import Law

# A free coordinate closer to a bound than this has run to it.
AT_BOUND = 1e-6
# Above this condition number of the scaled information matrix, float64 tells two parameters apart no more.
SINGULAR = 1e9


class NotIdentifiable(UserError, ValueError):
  """The rows do not determine the parameters. `reasons` says why, `cure` what to change."""

  def __init__(self, law: Law, reasons: list[str], cure: str):
    self.law = law
    self.reasons = reasons
    self.cure = cure
    super().__init__(f'{law.name} is not identifiable here: {"; ".join(reasons)}. {cure}')


@dataclasses.dataclass(frozen=True)
class Minimum:
  """One distinct local minimum.

  Attributes:
    parameters: natural values by name.
    starts: how many starts ended there.
    kind: 'minimum', 'bound' (a parameter is at a bound), 'saddle' or 'unconverged'.
  """

  parameters: dict[str, float]
  objective: float
  starts: int
  kind: str


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    parameters: natural values at the best minimum, by name.
    objective: sum_i w_i rho(r_i) there.
    minima: all distinct minima, best first.
    starts: how many starts were run.
    z: the free dimensionless coordinates at the best minimum [free].
    covariance, correlations: of z [free, free]; see `curvature.covariance`.
    condition: the condition number of the scaled information matrix.
    data: the rows as `fit_data.make_data` gives them.
    observed, weights: of each row [rows].
    delta, tau: of the robust loss.
  """

  problem: objective.Problem
  parameters: dict[str, float]
  objective: float
  minima: tuple[Minimum, ...]
  starts: int
  z: np.ndarray
  covariance: np.ndarray
  condition: float
  correlations: np.ndarray
  data: dict = dataclasses.field(repr=False)
  observed: np.ndarray = dataclasses.field(repr=False)
  weights: np.ndarray = dataclasses.field(repr=False)
  delta: float = 1e-3
  tau: float = 0.5

  @property
  def law(self) -> Law:
    return self.problem.law

  def predict(self, **inputs) -> np.ndarray:
    """The fitted law at any inputs, which broadcast."""
    return self.law(self.parameters, **inputs)

  @property
  def fitted(self) -> np.ndarray:
    """The fitted law at the rows, [rows]."""
    return self.predict(**{name: self.data['x'][name] for name in self.law.inputs})

  @property
  def residuals(self) -> np.ndarray:
    """Predicted minus observed [rows], or the difference of their logarithms where the fit's residuals are."""
    if self.problem.residuals == 'log':
      return np.log(self.fitted) - np.log(self.observed)
    return self.fitted - self.observed

  @property
  def standard_errors(self) -> dict[str, float]:
    """Robust (sandwich) standard errors by the delta method. A bootstrap is better where rows are few."""
    # Natural values mix exp and products of a few numbers: central differences have nine digits here.
    step = 1e-5
    slopes = []
    for dz in np.eye(len(self.z)) * step:
      up = self.problem.values(self.z + dz, self.data['center'], np.exp)
      down = self.problem.values(self.z - dz, self.data['center'], np.exp)
      slopes.append({name: (up[name] - down[name]) / (2 * step) for name in up})
    errors = {}
    for name in self.parameters:
      slope = np.array([s[name] for s in slopes])
      errors[name] = float(np.sqrt(max(slope @ self.covariance @ slope, 0.0)))
    return errors

  def __str__(self) -> str:
    errors = self.standard_errors
    lines = [f'{self.law.name}: {self.law.form}   objective {self.objective:.10g}']
    lines += [f'  {k:8s} {v:<12.6g} ± {errors[k]:.3g}' for k, v in self.parameters.items()]
    lines.append(f'  {len(self.minima)} distinct minima from {self.starts} starts:')
    lines += [f'    {m.objective:.10g}  {m.kind}, {m.starts} starts' for m in self.minima[:6]]
    return '\n'.join(lines)


def jacobian(result: Fit) -> np.ndarray:
  """d ln L / dz of the fitted law at its rows, [rows, free]."""
  predicted, slopes = solver.with_slopes(result.problem, result.data, result.z)
  return slopes / predicted[:, None]


def unidentified(result: Fit) -> list[str]:
  """Reasons why the rows may not determine the parameters; empty when they do.

  It looks first at the rows (do they vary, are they enough), then at parameters at a guarding bound, then at
  the curvature. It stops at the first of the three that gives a reason, since the later ones follow from it.
  """
  reasons = []
  for name in result.law.inputs:
    values = result.data['x'][name]
    needed = [k for k in result.problem.free if name in result.law.parameters[k].units]
    if needed and np.ptp(values) <= 1e-9 * np.abs(values).max():
      reasons.append(f'every row has the same {name}')
  x = result.data['x']
  # One budget is one isoFLOP curve: it has a minimum, but no direction in which the budget grows.
  if {'params', 'tokens'} <= set(x) and np.ptp(x['ln_params'] + x['ln_tokens']) < 1e-3:
    reasons.append('every row has the same budget N D')
  free = len(result.problem.free)
  rows = len(result.observed)
  if rows <= free:
    reasons.append(f'{free} parameters go through {rows} rows whatever they are')
  elif rows == free + 1:
    reasons.append(f'{rows} rows leave one degree of freedom to {free} parameters')
  if reasons:
    return reasons
  low, high = result.problem.bounds()
  for name, z, a, b in zip(result.problem.free, result.z, low, high, strict=True):
    if (z - a < AT_BOUND or b - z < AT_BOUND) and not result.law.parameters[name].limits:
      value = result.parameters[name]
      reasons.append(f'{name} ran to its bound ({value:.3g})')
  if reasons:
    return reasons
  if not np.isfinite(result.condition) or result.condition > SINGULAR:
    few = [k for k in result.law.inputs if len(np.unique(result.data['x'][k])) <= 2]
    because = f'; {" and ".join(few)} take only 2 values' if few else ''
    reasons.append(f'the curvature is singular (condition number {result.condition:.1e}{because})')
  return reasons


def near_zero(result: Fit) -> list[str]:
  """The parameters of any sign, such as exponents, whose standard error is over half of their size.

  The sandwich error is an estimate at one point and often too large for a robust loss. So these are candidates
  only: `law_fit.not_determined` fits again without each of them and decides.
  """
  errors = result.standard_errors
  return [
    name
    for name in result.problem.free
    if not result.law.parameters[name].positive
    and errors[name] > 0.5 * abs(result.parameters[name])
  ]


def show_minima(result: Fit) -> list[str]:
  """Lines of text: each distinct minimum with its parameters, then the ends that did not converge."""

  def values(minimum: Minimum) -> str:
    return ', '.join(f'{name} {value:.4g}' for name, value in minimum.parameters.items())

  converged = [m for m in result.minima if m.kind != 'unconverged']
  stopped = [m for m in result.minima if m.kind == 'unconverged']
  lines = [
    f'  {len(converged)} distinct {"minimum" if len(converged) == 1 else "minima"} from '
    f'{result.starts} starts, condition number {result.condition:.2g}'
  ]

  lines += [
    f'    also {m.objective:.10g} ({m.kind}, {m.starts} starts): {values(m)}' for m in converged[1:]
  ]
  if stopped:
    lines.append(f'    {sum(m.starts for m in stopped)} starts did not converge; they ended at')
    lines += [f'      {m.objective:.10g} ({m.starts} starts): {values(m)}' for m in stopped]
  return lines


def cure(result: Fit) -> str:
  """The sentence that says what to change where the rows do not determine the parameters."""
  names = set(result.law.parameters)
  if {'alpha', 'beta'} <= names and 'beta' in result.problem.free:
    return 'Add budgets or sizes, widen the range of both N and D, or fit TiedChinchilla.'
  return 'Add runs over a wider range of every input, or fix or tie parameters.'
