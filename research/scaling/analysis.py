"""The result of a fit: the three approaches, their forecasts, and the doubts about them.

`research.scaling.plot` draws an analysis; `save` writes it to a file and `load` reads it back.
"""

import dataclasses
import functools

import numpy as np

from research.scaling import (
  allocation,
  bootstrap,
  comparison,
  fitted,
  forecasting,
  planning,
  prior_fit,
  rollout,
  text,
)
from research.scaling import rows as table
from research.scaling.cost import Cost
from research.scaling.forecast import Forecast, NoForecast, Optimum


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What a set of rows says about N*(C), D*(C) and the loss.

  Attributes:
    rows: the rows that were fitted, and those that were left out.
    cost: C as a function of N and D, the FLOP convention of the rows.
    approach1, approach2, approach3: the envelope, the isoFLOP minima and the fitted law; None where refused.
    bootstrap: of approach 3.
    refusals: why an approach was refused, by its name.
    notes: sentences about the fits, worst first.
    conventions: the exponents under other counts of N and C, a row each.
    level: of every interval.
    rule: the name of the rule that makes forecasts.
    doubts: sentences about the table, to read before any number.
  """

  rows: table.Observations
  cost: Cost
  approach1: allocation.Allocation | None
  approach2: allocation.Allocation | None
  approach3: fitted.Fit | None
  bootstrap: bootstrap.Bootstrap | None
  refusals: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  conventions: tuple[dict, ...] = ()
  level: float = 0.9
  rule: str = forecasting.DEFAULT
  doubts: tuple[str, ...] = ()

  @functools.cached_property
  def trials(self) -> tuple[rollout.RollOut, ...]:
    """Forecasts of the larger budgets from the smaller ones, by approaches 2 and 3, beside the outcomes."""
    if self.approach2 is None or self.approach3 is None:
      return ()
    return rollout.roll_out(self.rows, self.cost, self.approach2, self.approach3)

  @functools.cached_property
  def learned(self) -> prior_fit.PriorFit:
    """The fit with learned priors, which the default rule forecasts with."""
    rows = self.rows
    return prior_fit.fit(rows.params, rows.tokens, rows.loss, prior_fit.LEARNED, rows.flops)

  @functools.cached_property
  def compared(self) -> tuple[comparison.Compared, ...]:
    """Chinchilla, TiedChinchilla and GammaChinchilla by AICc, best first; empty for too few rows."""
    return tuple(comparison.compare(self.rows))

  @property
  def shares(self) -> dict[str, float]:
    """The share of each approach in a mean of approaches, without those of zero; they sum to one."""
    both = {'approach 2': self.approach2, 'approach 3': self.approach3}
    fitted_ones = [name for name, approach in both.items() if approach is not None]
    shares = rollout.shares(self.trials, fitted_ones)
    return {name: share for name, share in shares.items() if share}

  @property
  def method(self) -> str:
    """The method of a forecast, in words."""
    return forecasting.RULES[self.rule].method(self)

  @property
  def assumed(self) -> str | None:
    """'alpha = beta' where the law assumes this, so that a = b = 1/2 follows from it and not from the rows."""
    if self.approach3 is None:
      return None
    tied = (
      self.approach3.law.name == 'TiedChinchilla'
      or ('beta', 'alpha') in self.approach3.problem.tied
    )
    return 'alpha = beta' if tied and self.cost.p == 1.0 and not self.cost.constant else None

  def predict(self, params, tokens) -> np.ndarray:
    """The fitted loss in nats per token.

    Raises:
      NoForecast: no law of N and D was fitted.
    """
    if self.approach3 is None:
      raise NoForecast(
        f'No law of N and D was fitted: {self.refusals.get("approach 3", "not asked for")}'
      )
    return self.approach3.predict(params=params, tokens=tokens)

  def optimum(self, flops, approach: str | None = None) -> Optimum:
    """Compute-optimal N*, D* and their loss at a budget or an array of them.

    Args:
      approach: 'approach 2' or 'approach 3'; None for approach 3 where it was fitted.
    """
    if self._uses_law(approach):
      law = self.approach3.law
      return Optimum(*planning.optimum(law, self.approach3.parameters, flops, self.cost))
    power_laws = self.approach2
    flops = np.asarray(flops, np.float64)
    return Optimum(power_laws.params(flops), power_laws.tokens(flops), power_laws.loss(flops))

  def _uses_law(self, approach: str | None) -> bool:
    return self.approach3 is not None and approach in (None, 'approach 3')

  def optimum_samples(self, flops, approach: str | None = None) -> Optimum:
    """The optimum under every bootstrap replicate, [replicates, budgets] each."""
    flops = np.atleast_1d(np.asarray(flops, np.float64))
    if self._uses_law(approach):
      values = {k: v[:, None] for k, v in self.bootstrap.parameters.items()}
      return Optimum(*planning.optimum(self.approach3.law, values, flops, self.cost))
    samples = self.approach2.samples

    def power_law(column: int):
      exponent = samples[:, column : column + 1]
      ln_k = samples[:, column + 1 : column + 2]
      return np.exp(ln_k + exponent * np.log(flops))

    return Optimum(power_law(0), power_law(2), self.approach2.loss.floor + power_law(4))

  def exponents(self) -> dict[str, tuple[float, float, float]]:
    """{'a, approach 2': (value, low, high), ...}: N* ~ C^a and D* ~ C^b by each approach."""
    exponents = {}
    for k, approach in ((1, self.approach1), (2, self.approach2)):
      if approach is not None:
        for name, law in (('a', approach.params), ('b', approach.tokens)):
          spread = approach.interval(name, self.level)
          exponents[f'{name}, approach {k}'] = (law.exponent, *spread)
    if self.approach3 is None:
      return exponents
    # The law need not be a power law of C: its slope is taken between the ends of the fitted budgets.
    ends = np.array([self.rows.flops.min(), self.rows.flops.max()])

    def slope(values):
      return np.diff(np.log(values), axis=-1)[..., 0] / np.log(ends[1] / ends[0])

    best = self.optimum(ends)
    samples = self.optimum_samples(ends)
    for name, field in (('a', 'params'), ('b', 'tokens')):
      value = float(slope(getattr(best, field)))
      low, high = self.interval(slope(getattr(samples, field)))
      exponents[f'{name}, approach 3'] = (value, float(low), float(high))
    return exponents

  def forecast(self, flops: float | None = None, *, params=None, tokens=None) -> Forecast:
    """The loss at the optimum of `flops`, or of a run with these `params` and `tokens`, by `rule`.

    Raises:
      NoForecast: neither is named, or the rule cannot forecast from these fits.
    """
    names_run = params is not None and tokens is not None
    if not names_run and flops is None:
      raise NoForecast('forecast needs flops, or params and tokens.')
    if names_run and flops is None:
      flops = float(self.cost.flops(params, tokens))
    return forecasting.RULES[self.rule].forecast(self, float(flops), params, tokens)

  def value_at(self, *, params, tokens) -> tuple[float, float, float]:
    """The forecast of a run's loss, and its interval: (loss, low, high)."""
    forecast = self.forecast(params=params, tokens=tokens)
    return forecast.loss, forecast.loss_low, forecast.loss_high

  def interval(self, samples: np.ndarray) -> tuple:
    """(low, high) at `level` over the first axis of samples [replicates, ...], such as `optimum_samples`."""
    freedom = np.inf if self.approach3 is None else self.bootstrap.freedom
    return bootstrap.interval(samples, self.level, freedom)

  def __str__(self) -> str:
    return text.summary(self)

  __repr__ = __str__
