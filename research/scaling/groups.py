"""Whether one table holds several things: two units, two tokenizers, several studies. Asked of the losses."""

import collections
import math

import numpy as np

from research.scaling.fitted import Fit, jacobian
from research.scaling.rows import Observations


def two_groups(rows: Observations, rounds: int = 30) -> str | None:
  """A sentence where the losses fall apart into two groups: two units or tokenizers in one table.

  ln L is taken as a quadratic in ln N and ln D, plus one offset for a group; rows and offset are found in turn
  (as k-means does), from the sign of the residuals. Of one population that splits it near its middle, some
  three of the halves' spreads apart.
  """
  n = len(rows)
  if n < 16:
    return None
  x, z = (np.log(v) - np.log(v).mean() for v in (rows.params, rows.tokens))
  surface = np.stack([np.ones(n), x, z, x * x, x * z, z * z], 1)
  y = np.log(rows.loss)
  above = y > surface @ np.linalg.lstsq(surface, y, rcond=None)[0]
  for _ in range(rounds):
    if not 0.1 * n <= above.sum() <= 0.9 * n:
      return None
    coefficients = np.linalg.lstsq(np.column_stack([surface, above]), y, rcond=None)[0]
    residual, before = y - surface @ coefficients[:-1], above
    above = residual > coefficients[-1] / 2
    if (above == before).all():
      break
  gap = float(np.median(residual[above]) - np.median(residual[~above]))
  within = 1.4826 * float(np.median(np.abs(residual - above * gap - np.median(residual[~above]))))
  if gap < max(7 * within, 0.03):
    return None
  named = ', '.join(map(str, rows.run[np.flatnonzero(above)[:3]]))
  sentence = (
    f'the losses fall into two groups {math.expm1(gap):.0%} apart: {above.sum()} rows ({named}, '
    f'...) lie above the other {n - above.sum()}.'
  )
  in_bits = abs(gap - math.log(1 / math.log(2))) < 0.03
  bits = ' 1.44 is bits over nats: some rows are in bits, it seems.' if in_bits else ''
  return (
    f'{sentence}{bits} Two units, tokenizers or data sets cannot share one law: fit them apart '
    '(--where=COLUMN=VALUE).'
  )


def several_studies(rows: Observations, fit: Fit) -> list[str]:
  """A sentence for a column of words whose values lie apart: studies, data sets or schedules in one table."""
  residuals = np.log(rows.loss) - np.log(fit.fitted)
  told = []
  for name, labels in rows.labels.items():
    if rows.columns.get('run') == name:
      continue
    groups = {value: residuals[labels == value] for value in np.unique(labels)}
    groups = {value: group for value, group in groups.items() if len(group) >= 4}
    if _names_sizes(rows, labels):
      continue
    if len(groups) < 2:
      continue
    middles = {value: float(np.median(group)) for value, group in groups.items()}
    within = np.concatenate([group - np.median(group) for group in groups.values()])
    spread = 1.4826 * float(np.median(np.abs(within)))
    low, high = min(middles, key=middles.get), max(middles, key=middles.get)
    apart = middles[high] - middles[low]
    error = spread * math.sqrt(1 / len(groups[low]) + 1 / len(groups[high]))
    if apart > 0.01 and apart > 6 * error:
      told.append((apart, name, low, high))
  return [
    f'rows of {name}={high} lie {math.expm1(apart):.1%} above those of {name}={low}: fit one at a '
    f'time, --where={name}={low}.'
    for apart, name, low, high in sorted(told, reverse=True)[:1]
  ]


def _names_sizes(rows: Observations, labels: np.ndarray) -> bool:
  """Whether a column of words says no more than N does, or than D, such as a model's name."""
  for values in (rows.params, rows.tokens):
    words = collections.defaultdict(set)
    for value, word in zip(values, labels, strict=True):
      words[value].add(word)
    if all(len(names) == 1 for names in words.values()) and len(words) <= 0.7 * len(values):
      return True
  return False


def step_in(rows: Observations, fit: Fit) -> str | None:
  """A sentence where the losses jump at one value of N or of D: another tokenizer or data set on its two sides.

  Each threshold's jump is estimated beside the law's own parameters (linearised), with the rows that lie far
  off left out, and counts where it is over 2% and 12 standard errors: a law that merely bends jumps by less.
  """
  residuals = np.log(rows.loss) - np.log(fit.fitted)
  spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals))) + 1e-12
  near = np.abs(residuals - np.median(residuals)) < 8 * spread
  slopes, y = jacobian(fit)[near], residuals[near]
  if len(y) < slopes.shape[1] + 8:
    return None
  best = None
  for name, symbol in (('params', 'N'), ('tokens', 'D')):
    values = getattr(rows, name)[near]
    for threshold in np.quantile(values, np.linspace(0.15, 0.85, 15)):
      below = (values < threshold).astype(float)
      if not 5 <= below.sum() <= len(y) - 5:
        continue
      table = np.column_stack([slopes / np.linalg.norm(slopes, axis=0), below])
      coefficients, *_ = np.linalg.lstsq(table, y, rcond=None)
      residual = y - table @ coefficients
      variance = (residual**2).sum() / (len(y) - table.shape[1])
      error = math.sqrt(max(np.linalg.pinv(table.T @ table)[-1, -1] * variance, 1e-30))
      if best is None or abs(coefficients[-1]) / error > best[0]:
        best = abs(coefficients[-1]) / error, float(coefficients[-1]), symbol, threshold
  if best is None or best[0] < 12 or abs(best[1]) < 0.02:
    return None
  _, jump, symbol, threshold = best
  side = 'above' if jump > 0 else 'below'
  return (
    f'the losses jump where {symbol} passes {threshold:.3g}: below it they lie some '
    f'{abs(math.expm1(jump)):.0%} {side} what one law would have. Another tokenizer, data set or '
    'evaluation there? If so fit the two apart, '
    f"--where='{rows.columns.get('params' if symbol == 'N' else 'tokens', symbol)}>{threshold:.3g}'."
  )
