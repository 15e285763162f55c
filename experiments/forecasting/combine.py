"""Ways to combine the forecasts of two approaches, compared on published isoFLOP sweeps.

    python experiments/forecasting/combine.py --results=porian_isoflops.csv

The table is that of Porian et al. 2024 (arXiv:2406.19146): fifteen sweeps of 11 or 12 budgets, each twice the
one before. Every six budgets in a row, one and a half decades, forecast the lowest loss at 8 and at 16 times
the largest of them, and its size. The same table has the outcome. The cost of a wrong size is read from the
curve of that budget.
"""

import argparse
import collections
import csv
import math

import numpy as np

from research.scaling import allocation, approaches, law_fit, laws, planning, rollout
from research.scaling.cost import fit_cost

SETTING = ('dataset', 'hparams', 'warmup', 'decay', 'count')
WINDOW = 6
ROWS = (
  132  # of the largest sweep. Every table is padded to it, so that one compiled fit serves all.
)


class Table:
  """One published sweep, and both approaches' forecasts from any of its budgets."""

  def __init__(self, rows: list[dict]):
    columns = [np.array([float(row[name]) for row in rows]) for name in ('n', 't', 'flops', 'loss')]
    self.n, self.d, self.c, self.loss = columns
    self.cost = fit_cost(self.n, self.d, self.c)
    self.budgets = np.unique(self.c)
    self.profiles = {}
    for budget in self.budgets:
      n, d, loss = (column[self.c == budget] for column in (self.n, self.d, self.loss))
      profile = approaches.profile(budget, n, d, loss, self.cost)
      if profile.refused is None:
        self.profiles[budget] = profile
    self.fitted = {}

  def power_law(self, budgets, flops: float) -> tuple[float, float]:
    """(N*, the lowest loss) by approach 2."""
    used = [self.profiles[budget] for budget in budgets]
    size, loss = (
      float(allocation.power_law(np.array(budgets), np.array(values))(flops))
      for values in ([p.params_opt for p in used], [p.loss_opt for p in used])
    )
    return size, loss

  def law(self, first: float, last: float, flops: float) -> tuple[float, float]:
    """(N*, the lowest loss) by approach 3, of the rows of the budgets from `first` to `last`."""
    if (first, last) not in self.fitted:
      within = (self.c > 0.99 * first) & (self.c < 1.01 * last)
      # Rows outside of the window and the padding have no weight.
      x = {'params': _pad(self.n, self.n[0]), 'tokens': _pad(self.d, self.d[0])}
      loss = _pad(self.loss, self.loss[0])
      weights = _pad(within.astype(float), 0.0)
      self.fitted[first, last] = law_fit.fit(
        laws.Chinchilla(), x, loss, weights=weights, check=False
      )
    fit = self.fitted[first, last]
    n, _, loss = planning.optimum(fit.law, fit.parameters, np.array([flops]), self.cost)
    return float(n[0]), float(loss[0])

  def both(self, budgets, first, flops) -> dict[str, tuple[float, float]]:
    return {
      'approach 2': self.power_law(budgets, flops),
      'approach 3': self.law(first, budgets[-1], flops),
    }

  def forecasts(self):
    """(factor beyond the window, forecasts by approach, trials within the window, outcome's profile)."""
    for i in range(len(self.budgets) - WINDOW + 1):
      window = self.budgets[i : i + WINDOW]
      used = [c for c in window if c in self.profiles]
      trials = []
      for k in range(2, len(used)):
        for c in used[k:]:
          for name, (_, loss) in self.both(used[:k], window[0], c).items():
            error = math.log(loss / self.profiles[c].loss_opt)
            trials.append(rollout.RollOut(name, k, c, c / used[k - 1], error))
      for doublings in (3, 4):
        j = i + WINDOW - 1 + doublings
        if j < len(self.budgets) and self.budgets[j] in self.profiles:
          c = self.budgets[j]
          yield 2**doublings, self.both(used, window[0], c), tuple(trials), self.profiles[c]


def _pad(column: np.ndarray, fill: float) -> np.ndarray:
  return np.pad(column, (0, ROWS - len(column)), constant_values=fill)


def cost_of(size: float, profile) -> float:
  """By how much the parabola of a budget is higher at a size than at its minimum, as a share of the loss."""
  bend = np.polyfit(np.log(profile.params), profile.loss, 2)[0]
  return float(bend * math.log(size / profile.params_opt) ** 2 / profile.loss_opt)


def by_errors(trials) -> dict[str, float]:
  """Shares by the inverse mean squared errors of the trials; equal ones where there are none."""
  names = ('approach 2', 'approach 3')
  if not trials:
    return dict.fromkeys(names, 0.5)
  squares = [np.mean([t.error**2 for t in trials if t.approach == name]) for name in names]
  inverse = 1 / np.array(squares)
  return dict(zip(names, inverse / inverse.sum(), strict=True))


RULES = {
  'power law alone': lambda trials: {'approach 2': 1.0},
  'Chinchilla alone': lambda trials: {'approach 3': 1.0},
  'by their errors': by_errors,
  'equal': lambda trials: {'approach 2': 0.5, 'approach 3': 0.5},
  'ours': lambda trials: rollout.shares(trials, ('approach 2', 'approach 3')),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--results', required=True, metavar='CSV')
  with open(parser.parse_args().results) as file:
    groups = collections.defaultdict(list)
    for row in csv.DictReader(file):
      groups[tuple(row[k] for k in SETTING)].append(row)
  errors, sizes, costs = (collections.defaultdict(list) for _ in range(3))
  for setting, rows in groups.items():
    named = dict(zip(SETTING, setting, strict=True))
    sound = named['decay'] == 'chinchilla' or named['hparams'] == 'tuned'
    kinds = ('all', 'sound') if sound else ('all',)
    for far, forecasts, trials, outcome in Table(rows).forecasts():
      for rule, shares_by in RULES.items():
        shares = shares_by(trials)
        loss = sum(w * forecasts[k][1] for k, w in shares.items())
        ln_size = sum(w * math.log(forecasts[k][0]) for k, w in shares.items())
        for kind in kinds:
          errors[kind, far, rule].append(loss / outcome.loss_opt - 1)
          sizes[kind, far, rule].append(ln_size - math.log(outcome.params_opt))
          costs[kind, far, rule].append(cost_of(math.exp(ln_size), outcome))
  print('sound: the sweeps with a cosine to each horizon or tuned hyper-parameters')
  by_kind = sorted(errors, key=lambda key: key[:2])
  print(
    f'{"sweeps":8}{"far":>4} {"rule":17}{"forecasts":>10}{"mean":>8}{"median |e|":>12}{"rms":>7}  within 1%'
  )
  for kind, far, rule in by_kind:
    e = 100 * np.array(errors[kind, far, rule])
    rms = math.sqrt(np.mean(e**2))
    near = np.mean(abs(e) < 1)
    print(
      f'{kind:8}{far:3}x {rule:17}{len(e):10}{e.mean():+8.2f}{np.median(abs(e)):12.2f}{rms:7.2f}  {near:9.0%}'
    )
  print('\nthe size: the factor by which it is off, and what that costs in percent of the loss')
  print(f'{"sweeps":8}{"far":>4} {"rule":17}{"mean":>8}{"typical":>9}{"cost":>7}{"worst":>8}')
  for kind, far, rule in by_kind:
    e = np.array(sizes[kind, far, rule])
    cost = 100 * np.array(costs[kind, far, rule])
    mean = math.exp(e.mean())
    typical = math.exp(math.sqrt(np.mean(e**2)))
    print(f'{kind:8}{far:3}x {rule:17}{mean:8.2f}{typical:9.2f}{cost.mean():7.2f}{cost.max():8.2f}')


if __name__ == '__main__':
  main()
