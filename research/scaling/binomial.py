"""Fits shares of examples, such as accuracies, with the noise of binomial counts.

An accuracy near 1/2, or of few examples, is noisier than one near 0, or of many. The fit weighs each row by the
inverse of its binomial variance at the fitted share, in a few rounds (quasi-likelihood, McCullagh & Nelder
1989, chapter 9). The bootstrap draws new counts, wider where the rows scatter more than counts.
"""

from collections.abc import Mapping

import numpy as np

from research.core.errors import UserError
from research.scaling import bootstrap, law_fit
from research.scaling.fitted import Fit
from research.scaling.laws.base import Law

# The weights follow the fit and the fit the weights; the third round changes no digit that is shown.
ROUNDS = 3


def fit(law: Law, inputs: Mapping[str, np.ndarray], share, examples, **options) -> Fit:
  """`law_fit.fit` of shares, each weighted by the inverse of its binomial variance.

  Args:
    share: the law's output [rows], in [0, 1].
    examples: how many examples each is of [rows], or one number for all.
    options: of `law_fit.fit`; its loss and its residuals are fixed here.

  Raises:
    UserError: a share is not between 0 and 1, or a number of examples is below 1.
  """
  share = np.asarray(share, np.float64)
  examples = np.broadcast_to(np.asarray(examples, np.float64), share.shape)
  if not ((share >= 0) & (share <= 1)).all():
    raise UserError(
      f'{law.name}: {law.output} must be between 0 and 1, as a share of examples is; divide percents by 100.'
    )
  if not (np.isfinite(examples) & (examples >= 1)).all():
    raise UserError('A share needs 1 example or more in every row.')
  options = {**options, 'robust': 'l2', 'residuals': 'linear'}
  check = options.pop('check', True)
  guess = (share * examples + 0.5) / (examples + 1)  # never 0 or 1, whose variance would be zero
  for _ in range(ROUNDS):
    result = law_fit.fit(
      law, inputs, share, weights=1 / _variance(guess, examples), check=False, **options
    )
    guess = result.fitted
  # The check fits again; it is only of interest for the last round.
  if check:
    weights = result.weights
    result = law_fit.fit(law, inputs, share, weights=weights, check=True, **options)
  return result


def _variance(share, examples) -> np.ndarray:
  """p (1 - p) / n, with p at least half an example away from 0 and 1: no row has an infinite weight."""
  edge = 0.5 / examples
  inside = np.clip(share, edge, 1 - edge)
  return inside * (1 - inside) / examples


def dispersion(result: Fit, examples) -> float:
  """Pearson's chi-squared over its degrees of freedom: 1 where counts alone explain the scatter."""
  freedom = max(len(result.observed) - len(result.problem.free), 1)
  return float((result.residuals**2 / _variance(result.fitted, examples)).sum() / freedom)


def draw(share, examples, spread: float, rng) -> np.ndarray:
  """Measured shares of `examples` examples where the true ones are `share`, scattered `spread` times as far."""
  share = np.clip(share, 0.0, 1.0)
  examples = np.round(examples).astype(int)
  counts = rng.binomial(np.broadcast_to(examples, share.shape), share)
  return share + spread * (counts / examples - share)


def resample(result: Fit, examples, replicates: int = 1000, seed: int = 0) -> bootstrap.Bootstrap:
  """Refits `result` to counts that are drawn from it, wider where the rows scatter more than counts would."""
  rng = np.random.default_rng(seed)
  fitted = np.clip(result.fitted, 0.0, 1.0)
  examples = np.broadcast_to(np.asarray(examples, np.float64), fitted.shape)
  excess = max(1.0, dispersion(result, examples))
  drawn = draw(np.tile(fitted, (replicates, 1)), examples, np.sqrt(excess), rng)
  freedom = np.inf if excess == 1.0 else len(fitted) - len(result.problem.free)
  return bootstrap.refits(result, drawn, 'binomial', float(max(freedom, 1)))
