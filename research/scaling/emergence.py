"""Whether a skill that appears at some size is new, or existed before and the metric could not measure it.

An accuracy is a hard metric: it stays at chance until most of an answer is right. The loss of the right answer
is a smooth one. If the loss falls by one power law all along, the emergence is of the metric, and the loss
forecasts it (Schaeffer et al. 2023, arXiv:2304.15004). If it bends where the accuracy rises, the model changed.
And if runs of one compute part there, some with the skill and some without, no law of compute tells one run.
"""

import dataclasses

import numpy as np
from scipy import stats

from research.scaling import diagnostics
from research.scaling.laws.regimes import BrokenPower, ComputeOptimal

# Rows that a law with a break, of six parameters, must have before it is compared with one without.
FEWEST = 10
# The AICc weight above which one law counts as the better one.
CLEAR = 0.95
# The share of the variance of ln(loss) that a law without a break must describe, or the loss forecasts little.
# A few rows that scatter never show a break: AICc takes the law with fewer parameters.
DESCRIBED = 0.95
# Runs are of one compute where it differs by no more than this share; packing alone makes a difference.
SAME = 0.01


@dataclasses.dataclass(frozen=True)
class Emergence:
  """What the rows say about an emergence.

  Attributes:
    verdict: 'metric', 'model', 'seeds', 'undecided' or 'none' (the accuracy is above chance from the start).
    chance_until: the largest compute up to which every accuracy may be chance; NaN where the first one is not.
    fall: by what share the loss falls over those runs.
    falls: the p value of that fall.
    broken: the AICc weight of a power law with a break against one without; NaN for too few rows.
    described: the share of the variance of ln(loss) that the one without describes; NaN for too few rows.
    scatter: of runs of one compute, the standard deviations of the logarithm of their losses, before and after
      the accuracy rises; NaN without such runs.
    parts: the p value of a second one that is no larger than the first; NaN without such runs.
  """

  verdict: str
  chance_until: float
  fall: float
  falls: float
  broken: float
  described: float = np.nan
  scatter: tuple[float, float] = (np.nan, np.nan)
  parts: float = np.nan

  def __str__(self) -> str:
    if self.verdict == 'none':
      return 'accuracy is above chance at the smallest compute: nothing emerges in these rows.'
    weight = '' if np.isnan(self.broken) else f' (weight of a break: {self.broken:.2f})'
    ending = {
      'metric': f'The loss has no break{weight}: the jump is of the metric, and the loss forecasts it.',
      'model': f'The loss breaks too{weight}: the jump is of the model; smaller runs do not forecast it.',
      'seeds': (
        f'Then runs of one compute part: their losses scatter by {self.scatter[1]:.1%}, and by '
        f'{self.scatter[0]:.1%} before (p = {self.parts:.2g}). Whether a run has the skill is partly a matter '
        'of its seed, and no law of the compute forecasts a single run.'
      ),
      'undecided': f'These rows do not decide whether the loss breaks{weight}.',
    }
    if self.verdict == 'undecided' and self.described < DESCRIBED:
      ending['undecided'] += (
        f' A law without a break describes {self.described:.0%} of the variance of ln(loss), too little to '
        'forecast.'
      )
    return (
      f'up to {self.chance_until:.3g} FLOPs accuracy cannot be told from chance, while the loss '
      f'falls by {self.fall:.1%} (p = {self.falls:.2g}). {ending[self.verdict]}'
    )


def at_chance(accuracy, examples: float, chance: float) -> np.ndarray:
  """A mask of the accuracies [rows] of `examples` examples that are not above chance at 5%, one-sided.

  The test is exact, since the count of right answers is binomial.
  """
  correct = np.round(np.asarray(accuracy) * examples)
  # Without a chance of guessing, a single right answer is above it.
  if chance <= 0:
    return correct == 0
  return stats.binom.sf(correct - 1, round(examples), chance) > 0.05


def judge(flops, accuracy, loss, examples: float, chance: float) -> Emergence:
  """Judges an emergence.

  Args:
    flops: compute of each run [rows].
    accuracy: the hard metric [rows].
    loss: the smooth metric [rows], positive; lower is better.
    examples: how many examples an accuracy is of.
    chance: the accuracy of guessing.
  """
  order = np.argsort(flops)
  flops, accuracy, loss = (
    np.asarray(values, np.float64)[order] for values in (flops, accuracy, loss)
  )
  # A mask of the first runs, up to the first one above chance.
  below = np.cumprod(at_chance(accuracy, examples, chance)).astype(bool)
  count = int(below.sum())
  if count == 0:
    return Emergence('none', np.nan, np.nan, np.nan, np.nan)
  fall, p_value = 0.0, 1.0
  if count >= 3 and np.ptp(flops[below]) > 0:
    line = stats.linregress(np.log(flops[below]), np.log(loss[below]), alternative='less')
    fall = 1 - np.exp(line.slope * np.log(flops[below][-1] / flops[0]))
    p_value = line.pvalue
  broken = described = np.nan
  if len(loss) >= FEWEST and count < len(loss):
    smooth, bent = diagnostics.compare((ComputeOptimal(), BrokenPower()), {'flops': flops}, loss)
    broken = bent['weight']
    described = 1 - smooth['rss'] / max(len(loss) * np.var(np.log(loss)), 1e-300)
  scatter, parts = _scatter(flops, loss, below)
  verdict = 'undecided'
  if parts < 0.05:
    verdict = 'seeds'
  elif p_value < 0.05 and broken < 1 - CLEAR and described >= DESCRIBED:
    verdict = 'metric'
  elif broken > CLEAR:
    verdict = 'model'
  numbers = (flops[below][-1], fall, p_value, broken, described)
  return Emergence(verdict, *map(float, numbers), scatter, parts)


def _scatter(flops, loss, below) -> tuple[tuple[float, float], float]:
  """(deviations of ln(loss) among runs of one compute, before and after; the p value that they did not grow).

  The test is that of two variances (F).

  Args:
    flops: compute of each run [rows], in ascending order.
    loss: [rows].
    below: a mask [rows] of the runs before the accuracy rises.
  """
  new = np.diff(np.log(flops), prepend=-np.inf) > SAME
  group = np.cumsum(new)
  squares, degrees = np.zeros(2), np.zeros(2)
  for number in np.unique(group):
    members = group == number
    after = int(not below[members].all())
    squares[after] += np.sum((np.log(loss[members]) - np.log(loss[members]).mean()) ** 2)
    degrees[after] += members.sum() - 1
  if degrees.min() == 0 or squares[0] == 0:
    return (np.nan, np.nan), np.nan
  variances = squares / degrees
  p_value = stats.f.sf(variances[1] / variances[0], degrees[1], degrees[0])
  before, after = np.sqrt(variances)
  return (float(before), float(after)), float(p_value)
