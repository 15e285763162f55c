"""How forecasts of loss and size are best made of two approaches: tried on published isoFLOP sweeps.

    python experiments/forecasting/combine.py --results=porian_isoflops.csv

The table is that of Porian et al. 2024 (arXiv:2406.19146): fifteen sweeps of 11 or 12 budgets, each doubled.
Every six budgets in a row, one and a half decades, forecast the lowest loss at 8 and at 16 times the largest
of them, and the size that has it, which the same table knows. A size that is off costs what the curve of that
budget says.
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
ROWS = 132  # of the largest sweep: with every table padded to it one compiled fit serves all


class Table:
  """One published sweep, and both approaches' forecasts from any of its budgets."""

  def __init__(self, rows: list[dict]):
    column = lambda name: np.array([float(row[name]) for row in rows])
    self.n, self.d, self.c, self.loss = map(column, ('n', 't', 'flops', 'loss'))
    self.cost = fit_cost(self.n, self.d, self.c)
    self.budgets = np.unique(self.c)
    at = lambda c: [v[self.c == c] for v in (self.n, self.d, self.loss)]
    profiles = {c: approaches.profile(c, *at(c), self.cost) for c in self.budgets}
    self.found = {c: p for c, p in profiles.items() if p.refused is None}
    self.fitted = {}

  def power_law(self, budgets, flops: float) -> tuple[float, float]:
    """(N*, the lowest loss)."""
    through = lambda values: float(allocation.power_law(np.array(budgets), np.array(values))(flops))
    used = [self.found[c] for c in budgets]
    return through([p.params_opt for p in used]), through([p.loss_opt for p in used])

  def law(self, first: float, last: float, flops: float) -> tuple[float, float]:
    if (first, last) not in self.fitted:
      pad = lambda v, fill: np.pad(v, (0, ROWS - len(v)), constant_values=fill)
      within = (self.c > 0.99 * first) & (self.c < 1.01 * last)
      x = {'params': pad(self.n, self.n[0]), 'tokens': pad(self.d, self.d[0])}
      loss, weights = pad(self.loss, self.loss[0]), pad(within.astype(float), 0.0)
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
    """(how far, forecasts by approach, trials within the window, the profile that is there)."""
    for i in range(len(self.budgets) - WINDOW + 1):
      window = self.budgets[i : i + WINDOW]
      used = [c for c in window if c in self.found]
      trials = []
      for k in range(2, len(used)):
        for c in used[k:]:
          for name, (_, told) in self.both(used[:k], window[0], c).items():
            error, distance = math.log(told / self.found[c].loss_opt), c / used[k - 1]
            trials.append(rollout.RollOut(name, k, c, distance, error))
      for doublings in (3, 4):
        if (j := i + WINDOW - 1 + doublings) < len(self.budgets) and self.budgets[j] in self.found:
          c = self.budgets[j]
          yield 2**doublings, self.both(used, window[0], c), tuple(trials), self.found[c]


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
  return dict(zip(names, (1 / s / sum(1 / np.array(squares)) for s in squares), strict=True))


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
    made = dict(zip(SETTING, setting, strict=True))
    kinds = ['all'] + ['sound'] * (made['decay'] == 'chinchilla' or made['hparams'] == 'tuned')
    for far, told, trials, found in Table(rows).forecasts():
      for rule, share in RULES.items():
        shares = share(trials)
        loss = sum(w * told[k][1] for k, w in shares.items())
        ln_size = sum(w * math.log(told[k][0]) for k, w in shares.items())
        for kind in kinds:
          errors[kind, far, rule].append(loss / found.loss_opt - 1)
          sizes[kind, far, rule].append(ln_size - math.log(found.params_opt))
          costs[kind, far, rule].append(cost_of(math.exp(ln_size), found))
  print('sound: the sweeps with a cosine to each horizon or tuned hyper-parameters')
  by_kind = sorted(errors, key=lambda key: key[:2])
  print(
    f'{"sweeps":8}{"far":>4} {"rule":17}{"forecasts":>10}{"mean":>8}{"median |e|":>12}{"rms":>7}  within 1%'
  )
  for kind, far, rule in by_kind:
    e = 100 * np.array(errors[kind, far, rule])
    rms, near = math.sqrt(np.mean(e**2)), np.mean(abs(e) < 1)
    print(
      f'{kind:8}{far:3}x {rule:17}{len(e):10}{e.mean():+8.2f}{np.median(abs(e)):12.2f}{rms:7.2f}  {near:9.0%}'
    )
  print('\nthe size: the factor by which it is off, and what that costs in percent of the loss')
  print(f'{"sweeps":8}{"far":>4} {"rule":17}{"mean":>8}{"typical":>9}{"cost":>7}{"worst":>8}')
  for kind, far, rule in by_kind:
    e, cost = np.array(sizes[kind, far, rule]), 100 * np.array(costs[kind, far, rule])
    mean, typical = math.exp(e.mean()), math.exp(math.sqrt(np.mean(e**2)))
    print(f'{kind:8}{far:3}x {rule:17}{mean:8.2f}{typical:9.2f}{cost.mean():7.2f}{cost.max():8.2f}')


if __name__ == '__main__':
  main()
