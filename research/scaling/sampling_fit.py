"""Fits the coverage of repeated sampling to counts: of each problem the attempts n and the successes c."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import UserError
from research.scaling import any_law, bootstrap, repeated_sampling
from research.scaling import columns as columns_module
from research.scaling.columns import Columns
from research.scaling.laws.base import LawError
from research.scaling.laws.downstream import CoverageOfSamples
from research.scaling.options import Options

COUNTS = ('samples', 'correct')
MEANING = {
  'a': '-ln of the coverage of one attempt',
  'b': 'exponent of k, of the power law',
  'alpha': 'of the beta-binomial',
  'beta': 'of the beta-binomial',
  'exponent': 'of k from 10 on, as the beta-binomial forecasts it',
}


@dataclasses.dataclass(frozen=True)
class FittedCoverage:
  """A power law of -ln coverage and a beta-binomial distribution, both fitted to the same counts.

  Attributes:
    ks, coverage: as measured, by the unbiased estimator [ks].
    problems: how many there are.
    parameters: those that MEANING names.
    samples: the same under a bootstrap over problems, name -> [replicates].
    level: of every interval.
  """

  beta_binomial: repeated_sampling.BetaBinomial
  ks: np.ndarray
  coverage: np.ndarray
  problems: int
  parameters: dict[str, float]
  samples: dict[str, np.ndarray]
  level: float = 0.9

  def value_at(self, **inputs) -> tuple[float, float, float]:
    """(coverage at k attempts by the beta-binomial, low, high).

    The beta-binomial forecasts beyond the measured k, since it models how chances differ between problems.

    Raises:
      LawError: another input than k, or k below 1.
    """
    if set(inputs) != {'k'} or not inputs['k'] >= 1:
      raise LawError(
        'Coverage is a law of k, the attempts: ask for --predict=k=1000, k being 1 or more.'
      )
    k = inputs['k']
    value = float(self.beta_binomial.pass_at(k))
    drawn = repeated_sampling.BetaBinomial(self.samples['alpha'], self.samples['beta']).pass_at(k)
    return value, *self.interval(drawn)

  def interval(self, drawn) -> tuple[float, float]:
    """(low, high) of `drawn` [replicates]."""
    low, high = bootstrap.interval(drawn, self.level, self.problems - 2)
    return float(low), float(high)

  def __str__(self) -> str:
    pairs = zip(self.ks, self.coverage, strict=True)
    lines = [
      f'{self.problems} problems; coverage, the share that one of k attempts solves:',
      '  ' + ', '.join(f'k = {k:g}: {c:.4f}' for k, c in pairs),
      f'CoverageOfSamples: coverage = {CoverageOfSamples.form}, and a beta-binomial of the counts',
    ]
    for name, value in self.parameters.items():
      low, high = self.interval(self.samples[name])
      lines.append(f'  {name:8s} {value:<11.5g} [{low:.4g}, {high:.4g}]  {MEANING[name]}')
    return '\n'.join(lines)


def has_counts(rows: list[Mapping], columns: Columns) -> bool:
  """Whether the table has counts of attempts, and not coverage by k."""
  names = {columns_module.bare(name) for name in columns_module.column_names(rows)}
  names |= {name.lower() for name in columns.inputs}
  return all(name in names for name in COUNTS) and 'coverage' not in names


def fit_coverage(
  rows: Iterable[Mapping],
  columns: Columns = any_law.DEFAULT,
  role: str | None = 'fit',
  options: Options = Options(),  # noqa: B008 (frozen)
) -> FittedCoverage:
  """Fits the law to pass@k at k = 1, 2, 5, ... up to the fewest attempts, and a beta-binomial to the counts.

  The bootstrap draws problems, since they are the sample. The law is fitted by least squares of
  ln(-ln coverage), in which it is a straight line.

  Raises:
    UserError: fewer than 5 problems, no coverage between 0 and 1 at two k, or a parameter is held.
  """
  law = CoverageOfSamples()
  if options.fixed or options.tied:
    raise UserError(
      'A fit to counts of attempts holds and ties no parameter; leave out fixed and tied.'
    )
  read = any_law.read(list(rows), COUNTS, law, columns, role)
  samples, correct = (read[name] for name in COUNTS)
  if len(samples) < 5:
    raise UserError(f'{len(samples)} problems are too few for a law of coverage: give 5 or more.')
  ks = repeated_sampling.grid_of_k(int(samples.min()))
  each = np.stack([repeated_sampling.pass_at_k(samples, correct, k) for k in ks])
  forecast = repeated_sampling.fit_beta_binomial(samples, correct)
  parameters = _parameters(ks, each.mean(1), forecast)
  rng = np.random.default_rng(options.seed)
  drawn = {name: np.empty(options.replicates) for name in parameters}
  for replicate in range(options.replicates):
    problems = rng.integers(len(samples), size=len(samples))
    again = repeated_sampling.fit_beta_binomial(samples[problems], correct[problems], forecast)
    for name, value in _parameters(ks, each[:, problems].mean(1), again).items():
      drawn[name][replicate] = value
  coverage = each.mean(1)
  return FittedCoverage(forecast, ks, coverage, len(samples), parameters, drawn, options.level)


def _parameters(ks, coverage, forecast: repeated_sampling.BetaBinomial) -> dict[str, float]:
  """The parameters that MEANING names."""
  a, b = repeated_sampling.power_law(ks, coverage)
  late = ks[ks >= 10] if (ks >= 10).sum() > 1 else ks
  exponent = forecast.exponent(late)
  return {'a': a, 'b': b, 'alpha': forecast.alpha, 'beta': forecast.beta, 'exponent': exponent}
