"""Looks for several things in one table, by its losses: two units, two tokenizers, several studies."""

import collections
import math

import numpy as np

from research.scaling.fitted import Fit, jacobian
from research.scaling.rows import Observations


def two_groups(rows: Observations, rounds: int = 30) -> str | None:
  """A sentence where the losses fall into two groups, such as two units or tokenizers; else None.

  ln L is modelled as a quadratic in ln N and ln D plus an offset for one group. Members and offset are fitted
  in turn, as in k-means, from the sign of the residuals. A single population splits near its middle, with the
  halves about three of their own spreads apart; the threshold is seven.
  """
  n = len(rows)
  if n < 16:
    return None
  x, z = (np.log(v) - np.log(v).mean() for v in (rows.params, rows.tokens))
  # A quadratic and not a law: its least squares need no start, and it need only be smooth.
  surface = np.stack([np.ones(n), x, z, x * x, x * z, z * z], 1)
  y = np.log(rows.loss)
  above = y > surface @ np.linalg.lstsq(surface, y, rcond=None)[0]
  for _ in range(rounds):
    # A few odd rows are outliers and not a group.
    if not 0.1 * n <= above.sum() <= 0.9 * n:
      return None
    coefficients = np.linalg.lstsq(np.column_stack([surface, above]), y, rcond=None)[0]
    residual = y - surface @ coefficients[:-1]
    before = above
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
  bits = ' Bits are 1.44 times nats: some rows seem to be in bits.' if in_bits else ''
  return (
    f'{sentence}{bits} Two units, tokenizers or data sets cannot share one law: fit them apart '
    '(--where=COLUMN=VALUE).'
  )


def several_studies(rows: Observations, fit: Fit) -> list[str]:
  """A sentence for the column of words whose values lie furthest apart, such as studies or data sets; else [].

  Two values lie apart where the medians of their residuals differ by more than 1% and 6 standard errors.
  """
  residuals = np.log(rows.loss) - np.log(fit.fitted)
  differences = []
  for name, labels in rows.labels.items():
    if rows.columns.get('run') == name:
      continue
    groups = {value: residuals[labels == value] for value in np.unique(labels)}
    groups = {value: group for value, group in groups.items() if len(group) >= 4}
    if len(groups) < 2 or _names_sizes(rows, labels):
      continue
    medians = {value: float(np.median(group)) for value, group in groups.items()}
    within = np.concatenate([group - np.median(group) for group in groups.values()])
    spread = 1.4826 * float(np.median(np.abs(within)))
    low = min(medians, key=medians.get)
    high = max(medians, key=medians.get)
    apart = medians[high] - medians[low]
    error = spread * math.sqrt(1 / len(groups[low]) + 1 / len(groups[high]))
    if apart > 0.01 and apart > 6 * error:
      differences.append((apart, name, low, high))
  return [
    f'rows of {name}={high} lie {math.expm1(apart):.1%} above those of {name}={low}: fit one at a '
    f'time, --where={name}={low}.'
    for apart, name, low, high in sorted(differences, reverse=True)[:1]
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
  """A sentence where the losses jump at one value of N or of D, as with another tokenizer beyond it; else None.

  The jump at each threshold is fitted together with the law's parameters (linearised), without the rows that
  are far off. It counts above 2% and 12 standard errors: a law of the wrong shape jumps by less.
  """
  residuals = np.log(rows.loss) - np.log(fit.fitted)
  spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals))) + 1e-12
  near = np.abs(residuals - np.median(residuals)) < 8 * spread
  slopes = jacobian(fit)[near]
  y = residuals[near]
  if len(y) < slopes.shape[1] + 8:
    return None
  best = None
  for name, symbol in (('params', 'N'), ('tokens', 'D')):
    values = getattr(rows, name)[near]
    # Not near the ends, where a jump and a bend of the law look alike.
    for threshold in np.quantile(values, np.linspace(0.15, 0.85, 15)):
      below = (values < threshold).astype(float)
      if not 5 <= below.sum() <= len(y) - 5:
        continue
      # Columns of one length: the derivatives by the parameters differ by orders of magnitude.
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
