"""How well each approach forecasts, tried on the sweep itself: fit the smaller budgets, forecast the larger."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.scaling import allocation, fitted, law_fit, planning
from research.scaling import rows as table
from research.scaling.cost import Cost


class RollOut(NamedTuple):
  """One trial: `error` is ln(forecast / found) of the lowest loss at `flops`, `distance` x the last budget."""

  approach: str
  fitted_budgets: int
  flops: float
  distance: float
  error: float


def roll_out(
  rows: table.Observations,
  cost: Cost,
  approach2: allocation.Allocation,
  approach3: fitted.Fit | None,
  least: int = 2,
) -> tuple[RollOut, ...]:
  """Every forecast of a larger budget's isoFLOP minimum from the `least` or more budgets below it.

  Approach 2 forecasts with the power law through the minima so far, approach 3 with the law fitted to the runs
  so far, at its own optimum. What is found is the minimum of the larger budget's profile; budgets without one
  are not asked for.
  """
  found = approach2.used
  trials = []
  for k in range(least, len(found)):
    top, larger = found[k - 1].flops, found[k:]
    ratio = [p.flops / top for p in larger]
    flops = np.array([p.flops for p in larger])
    forecasts = {
      'approach 2': allocation.power_law(*_lowest(found[:k]), floor=approach2.loss.floor)(flops)
    }
    below = rows.flops <= 1.05 * top
    if approach3 is not None and below.sum() > len(approach3.problem.free):
      law = law_fit.refit(approach3, weights=approach3.weights * below)
      forecasts['approach 3'] = planning.optimum(law.law, law.parameters, flops, cost)[2]
    for approach, losses in forecasts.items():
      for p, distance, loss in zip(larger, ratio, losses, strict=True):
        if np.isfinite(loss):
          error = float(np.log(loss / p.loss_opt))
          trials.append(RollOut(approach, k, float(p.flops), float(distance), error))
  return tuple(trials)


def shares(
  trials: tuple[RollOut, ...], approaches: Sequence[str], decisive: float = 8.0
) -> dict[str, float]:
  """What share each approach has in a forecast: equal ones, of those that are not plainly wrong.

  Plainly wrong is whose root mean squared error in the trials is over `decisive` times the lowest. Shares by
  those errors (Bates & Granger 1969) forecast worse than equal ones (experiments/forecasting), as they often do
  where trials are few and alike (Stock & Watson 2004, *Combination forecasts of output growth*).
  """
  errors = {name: [t.error for t in trials if t.approach == name] for name in approaches}
  rms = {name: float(np.sqrt(np.mean(np.square(e)))) if e else 0.0 for name, e in errors.items()}
  lowest = min(rms.values()) + 1e-9
  good = [name for name in approaches if rms[name] <= decisive * lowest]
  return {name: 1 / len(good) if name in good else 0.0 for name in approaches}


def _lowest(profiles):
  return np.array([p.flops for p in profiles]), np.array([p.loss_opt for p in profiles])
