"""Learning rates and batch sizes: a grid of runs, and the power law of the best rate."""

import collections
import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from research.designs.base import Answer, Picked, losses, positive
from research.designs.plan import Planned, Size


def best_rate(members: list[tuple[Planned, float]]) -> dict:
  """The best learning rate of the runs of one size.

  At the batch size with the lowest loss: the vertex of a parabola in ln rate, by least squares through the best
  rate and up to two neighbours on each side. A loss is the mean of its seeds.

  Args:
    members: a (run, loss) each.

  Returns:
    params, rate, batch, loss; `note`, why the rate is doubtful, or ''; `points`, {batch: [(rate, loss)]};
    `parabola`, its coefficients in ln rate, or None; `fitted`, its first and last rate.
  """
  cells = collections.defaultdict(list)
  for run, loss in members:
    cells[run.batch_size, run.learning_rate].append(loss)
  points = collections.defaultdict(list)
  for (batch, rate), values in sorted(cells.items()):
    points[batch].append((rate, float(np.mean(values))))
  loss, batch, rate = min(
    (loss, batch, rate) for batch, row in points.items() for rate, loss in row
  )
  best = {'params': members[0][0].size.params, 'rate': rate, 'batch': batch, 'loss': loss}
  best |= {'points': dict(points), 'parabola': None, 'note': ''}
  row = points[batch]
  i = row.index((rate, loss))
  if i in (0, len(row) - 1):
    return best | {'note': ' (the best rate is at the end of the grid)'}
  # Two neighbours on each side: further out the loss rises faster than a parabola in ln rate.
  x, y = np.array(row[max(0, i - 2) : i + 3]).T
  a, b, c = np.polyfit(np.log(x), y, 2)
  if a <= 0:
    return best | {'note': ' (the losses have no minimum over the rates)'}
  rate = float(np.exp(-b / (2 * a)))
  loss = float(c - b * b / (4 * a))
  best['fitted'] = float(x[0]), float(x[-1])
  return best | {'rate': rate, 'loss': loss, 'parabola': (float(a), float(b), float(c))}


def rates(runs: list[Planned], rows: list[dict]) -> Answer:
  """The best learning rate and batch of every size, and the power law of the rate as a `designs.Rule`."""
  from research.designs import charts  # matplotlib

  groups = collections.defaultdict(list)
  for run, loss in losses(runs, rows):
    groups[run.size.name].append((run, loss))
  best_of = {name: best_rate(members) for name, members in groups.items()}
  lines = [
    f'{name}: N = {s["params"]:,}, rate {s["rate"]:.3g}, batch {s["batch"]}: {s["loss"]:.4f}{s["note"]}'
    for name, s in best_of.items()
  ]
  best = [(s['params'], s['rate']) for s in best_of.values() if not s['note']]
  line = None
  if len(best) >= 2:
    n, rate = np.log(np.array(best, np.float64)).T
    slope, intercept = np.polyfit(n, rate, 1)
    centre = float(np.exp(n.mean()))
    line = float(np.exp(intercept + slope * n.mean())), centre, float(slope)
    value, _, slope = line
    lines.append(
      f'learning rate = {value:.3g} (N / {centre:.3g})^{slope:.3f}, from {len(best)} sizes:\n'
      f'learning_rate/designs.Rule:\n  value = {value:.4g}\n  at = {centre:.4g}\n  exponent = {slope:.4f}'
    )
  else:
    lines.append(
      f'no law: {len(best)} sizes have a best rate inside their grid, and two are needed.'
    )
  caption = (
    'Each point is a run (the mean of its seeds); stars are the vertices of parabolas in ln rate.'
  )
  figures = {'rates': (charts.rates(best_of, line), caption)} if best_of else {}
  rule = dict(zip(('value', 'at', 'exponent'), line, strict=True)) if line else None
  return Answer('\n'.join(lines), figures, {'sizes': best_of, 'rule': rule})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateBatch(Picked):
  """Learning rates x batch sizes at every size. The law of the best rate is a `Rule` for the next sweep.

  Attributes:
    ratio: tokens per parameter.
    rates: multiples of the rule's learning rate.
    batches: multiples of the rule's batch size.
    seeds: runs of each, with Run.seed 0, 1, ...; their mean loss counts.
  """

  ratio: float = 20.0
  rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
  batches: tuple[float, ...] = (1.0,)
  seeds: int = 1
  law: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    positive(self, rates=self.rates, batches=self.batches, seeds=(self.seeds,))

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = []
    for size in self.sizes(rungs):
      tokens = self.ratio * size.params
      usual = self.train_for(tokens, size, length, 'usual')
      for batch, rate, seed in itertools.product(self.batches, self.rates, range(self.seeds)):
        examples = max(1, round(batch * usual.batch_size))
        name = f'fit-{size.name}-b{examples}-r{rate:g}-s{seed}'
        knobs = {'batch_size': examples, 'learning_rate': rate * usual.learning_rate}
        runs.append(
          self.train_for(tokens, size, length, name, settings=(f'Run.seed={seed}',), **knobs)
        )
    return self.long_enough(runs, 'ratio')

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    return rates(runs, rows)
