"""Tests each approach on the sweep itself: fits the smaller budgets and forecasts the larger ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.scaling import allocation, fitted, law_fit, planning
from research.scaling import rows as table
from research.scaling.cost import Cost


class RollOut(NamedTuple):
  """One trial: a forecast of the lowest loss at a larger budget."""

  approach: str
  fitted_budgets: int
  flops: float  # of the larger budget
  distance: float  # flops over the largest fitted budget
  error: float  # ln(forecast / isoFLOP minimum)


def roll_out(
  rows: table.Observations,
  cost: Cost,
  approach2: allocation.Allocation,
  approach3: fitted.Fit | None,
  least: int = 2,
) -> tuple[RollOut, ...]:
  """Every forecast of a larger budget's isoFLOP minimum from the budgets below it.

  Approach 2 forecasts with the power law through the smaller minima, approach 3 at the optimum of the law
  fitted to the smaller runs. The outcome is the minimum of the larger budget's profile. Budgets without a
  minimum do not take part.

  Args:
    rows: all runs of the sweep.
    approach2, approach3: as fitted to all of them.
    least: the fewest budgets to forecast from.
  """
  profiles = approach2.used
  trials = []
  for k in range(least, len(profiles)):
    top = profiles[k - 1].flops
    larger = profiles[k:]
    ratio = [p.flops / top for p in larger]
    flops = np.array([p.flops for p in larger])
    smaller_flops = np.array([p.flops for p in profiles[:k]])
    smaller_loss = np.array([p.loss_opt for p in profiles[:k]])
    law2 = allocation.power_law(smaller_flops, smaller_loss, floor=approach2.loss.floor)
    forecasts = {'approach 2': law2(flops)}
    # C of the runs of one budget differs by a little.
    below = rows.flops <= 1.05 * top
    if approach3 is not None and below.sum() > len(approach3.problem.free):
      # Weights of zero keep the shapes, so that nothing compiles again.
      refit = law_fit.refit(approach3, weights=approach3.weights * below)
      forecasts['approach 3'] = planning.optimum(refit.law, refit.parameters, flops, cost)[2]
    for approach, losses in forecasts.items():
      for p, distance, loss in zip(larger, ratio, losses, strict=True):
        if np.isfinite(loss):
          error = float(np.log(loss / p.loss_opt))
          trials.append(RollOut(approach, k, float(p.flops), float(distance), error))
  return tuple(trials)


def shares(
  trials: tuple[RollOut, ...], approaches: Sequence[str], decisive: float = 8.0
) -> dict[str, float]:
  """The share of each approach in a forecast: equal, without those that are plainly wrong.

  An approach is plainly wrong if its root mean squared error in the trials is over `decisive` times the lowest.
  Shares in proportion to these errors (Bates & Granger 1969) forecast worse than equal ones
  (experiments/forecasting), as they often do where trials are few and alike (Stock & Watson 2004, *Combination
  forecasts of output growth*).
  """
  errors = {name: [t.error for t in trials if t.approach == name] for name in approaches}
  rms = {name: float(np.sqrt(np.mean(np.square(e)))) if e else 0.0 for name, e in errors.items()}
  lowest = min(rms.values()) + 1e-9
  good = [name for name in approaches if rms[name] <= decisive * lowest]
  return {name: 1 / len(good) if name in good else 0.0 for name in approaches}
