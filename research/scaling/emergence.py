"""Whether a skill that appears at some size is new, or was there and the metric could not see it.

An accuracy is a hard metric: it stays at chance until most of an answer is right. The loss of the right answer
is a smooth one. If it falls all the while by one power law, the emergence is of the metric and the loss
forecasts it (Schaeffer et al. 2023, arXiv:2304.15004); if it bends where the accuracy rises, the model changed.
"""

import dataclasses

import numpy as np
from scipy import stats

from research.scaling import diagnostics
from research.scaling.laws.regimes import BrokenPower, ComputeOptimal

# Rows that a law with a break, of six parameters, must have before it is compared with one without.
FEWEST = 10
# AICc weight above which one law is taken to be the better.
CLEAR = 0.95


@dataclasses.dataclass(frozen=True)
class Emergence:
  """`verdict`: 'metric', 'model', 'undecided' or 'none'.

  `chance_until`: the largest compute up to which no accuracy is told from chance; NaN where the first one is.
  `fall`: how far the loss falls over those runs, as a share. `falls`: the p value of that fall. `broken`: the
  AICc weight of a power law with a break against one without, NaN for too few rows.
  """

  verdict: str
  chance_until: float
  fall: float
  falls: float
  broken: float

  def __str__(self) -> str:
    if self.verdict == 'none':
      return 'accuracy is above chance at the smallest compute: nothing emerges in these rows.'
    start = (
      f'up to {self.chance_until:.3g} FLOPs accuracy is not told from chance, while the loss falls '
      f'by {self.fall:.1%} (p = {self.falls:.2g})'
    )
    weight = '' if np.isnan(self.broken) else f' (weight of a break: {self.broken:.2f})'
    return (
      start
      + {
        'metric': f'. The loss has no break{weight}: the jump is of the metric, and the loss foresees it.',
        'model': f'. The loss breaks too{weight}: the jump is of the model; smaller runs do not foresee it.',
        'undecided': f'. Whether the loss breaks these rows do not tell{weight}.',
      }[self.verdict]
    )


def at_chance(accuracy, examples: float, chance: float) -> np.ndarray:
  """Which accuracies [rows] of `examples` examples are not above chance at the level of 5%, one-sided.

  The count of right answers is binomial; its exact tail is used, so that a chance of 0 needs no special case.
  """
  correct = np.round(np.asarray(accuracy) * examples)
  tail = (
    stats.binom.sf(correct - 1, round(examples), chance) if chance > 0 else (correct == 0) * 1.0
  )
  return tail > 0.05


def judge(flops, accuracy, loss, examples: float, chance: float) -> Emergence:
  """What rows of compute, accuracy and loss [rows] say of an emergence.

  Args:
    flops: compute of each run. loss: the smooth metric, positive, lower is better.
    examples: how many examples an accuracy is of. chance: the accuracy of guessing.
  """
  order = np.argsort(flops)
  flops, accuracy, loss = (
    np.asarray(values, np.float64)[order] for values in (flops, accuracy, loss)
  )
  below = np.cumprod(at_chance(accuracy, examples, chance)).astype(
    bool
  )  # the first runs, all at chance
  count = int(below.sum())
  if count == 0:
    return Emergence('none', np.nan, np.nan, np.nan, np.nan)
  fall, p_value = 0.0, 1.0
  if count >= 3 and np.ptp(flops[below]) > 0:
    line = stats.linregress(np.log(flops[below]), np.log(loss[below]), alternative='less')
    fall, p_value = 1 - np.exp(line.slope * np.log(flops[below][-1] / flops[0])), line.pvalue
  broken = np.nan
  if len(loss) >= FEWEST and count < len(loss):
    compared = diagnostics.compare((ComputeOptimal(), BrokenPower()), {'flops': flops}, loss)
    broken = {line['law']: line['weight'] for line in compared}['BrokenPower']
  verdict = 'undecided'
  if p_value < 0.05 and broken < 1 - CLEAR:
    verdict = 'metric'
  elif broken > CLEAR:
    verdict = 'model'
  return Emergence(verdict, float(flops[below][-1]), float(fall), float(p_value), float(broken))
