"""What a set of rows says: the approaches that were fitted, their forecasts, and what to doubt.

`research.scaling.plot`, `save` and `load` draw an analysis and keep it in a file.
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
  """Everything a set of rows says about N*(C), D*(C) and the loss.

  `approach1`, `approach2`, `approach3` are None where refused; `refusals` says why, by name.
  `cost` is the rows' FLOP convention, `level` that of every interval, `rule` what makes a forecast.
  `doubts` are sentences about the table, to be read before any number; `notes` are about the fits.
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
    """Forecasts of the larger budgets from the smaller ones: which approach is not fit to forecast with."""
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
    """Chinchilla, TiedChinchilla and GammaChinchilla by AICc, best first; empty of too few rows."""
    return tuple(comparison.compare(self.rows))

  @property
  def shares(self) -> dict[str, float]:
    """What share each approach has in a forecast; they sum to one."""
    both = {'approach 2': self.approach2, 'approach 3': self.approach3}
    have = [name for name, found in both.items() if found is not None]
    found = rollout.shares(self.trials, have)
    return {name: share for name, share in found.items() if share}

  @property
  def method(self) -> str:
    """What a forecast is made by, in words."""
    return forecasting.RULES[self.rule].method(self)

  @property
  def assumed(self) -> str | None:
    """What the law assumes of its exponents, where N* ~ C^a follows from that and not from the rows."""
    if self.approach3 is None:
      return None
    tied = (
      self.approach3.law.name == 'TiedChinchilla'
      or ('beta', 'alpha') in self.approach3.problem.tied
    )
    return 'alpha = beta' if tied and self.cost.p == 1.0 and not self.cost.constant else None

  def predict(self, params, tokens) -> np.ndarray:
    """The fitted loss in nats per token; raises NoForecast without a law of N and D."""
    if self.approach3 is None:
      raise NoForecast(
        f'No law of N and D was fitted: {self.refusals.get("approach 3", "not asked for")}'
      )
    return self.approach3.predict(params=params, tokens=tokens)

  def optimum(self, flops, approach: str | None = None) -> Optimum:
    """Compute-optimal N*, D* and their loss at a budget or an array of them, by approach 3 if there is one."""
    if self._uses_law(approach):
      law, values = self.approach3.law, self.approach3.parameters
      return Optimum(*planning.optimum(law, values, flops, self.cost))
    two = self.approach2
    flops = np.asarray(flops, np.float64)
    return Optimum(two.params(flops), two.tokens(flops), two.loss(flops))

  def _uses_law(self, approach: str | None) -> bool:
    return self.approach3 is not None and approach in (None, 'approach 3')

  def optimum_samples(self, flops, approach: str | None = None) -> Optimum:
    """The optimum under every bootstrap replicate, [replicates, budgets] each."""
    flops = np.atleast_1d(np.asarray(flops, np.float64))
    if self._uses_law(approach):
      values = {k: v[:, None] for k, v in self.bootstrap.parameters.items()}
      return Optimum(*planning.optimum(self.approach3.law, values, flops, self.cost))
    s = self.approach2.samples
    line = lambda i: np.exp(s[:, i + 1 : i + 2] + s[:, i : i + 1] * np.log(flops))
    return Optimum(line(0), line(2), self.approach2.loss.floor + line(4))

  def exponents(self) -> dict[str, tuple[float, float, float]]:
    """{'a, approach 2': (value, low, high), ...}: N* ~ C^a and D* ~ C^b by each approach."""
    out = {}
    for k, found in ((1, self.approach1), (2, self.approach2)):
      if found is not None:
        out[f'a, approach {k}'] = (found.params.exponent, *found.interval('a', self.level))
        out[f'b, approach {k}'] = (found.tokens.exponent, *found.interval('b', self.level))
    if self.approach3 is not None:
      ends = np.array([self.rows.flops.min(), self.rows.flops.max()])
      slope = lambda v: np.diff(np.log(v), axis=-1)[..., 0] / np.log(ends[1] / ends[0])
      best, many = self.optimum(ends), self.optimum_samples(ends)
      for name, v, s in (('a', best.params, many.params), ('b', best.tokens, many.tokens)):
        out[f'{name}, approach 3'] = (float(slope(v)), *map(float, self.interval(slope(s))))
    return out

  def forecast(self, flops: float | None = None, *, params=None, tokens=None) -> Forecast:
    """The loss at the optimum of `flops`, or of a run of given `params` and `tokens`, by `rule`."""
    given = params is not None and tokens is not None
    if not given and flops is None:
      raise NoForecast('forecast needs flops, or params and tokens.')
    if given and flops is None:
      flops = float(self.cost.flops(params, tokens))
    return forecasting.RULES[self.rule].forecast(self, float(flops), params, tokens)

  def value_at(self, *, params, tokens) -> tuple[float, float, float]:
    """The loss forecast of a run, and the interval of it."""
    told = self.forecast(params=params, tokens=tokens)
    return told.loss, told.loss_low, told.loss_high

  def interval(self, samples: np.ndarray) -> tuple:
    """At `level`, over the first axis of values [replicates, ...] such as `optimum_samples` has."""
    freedom = np.inf if self.approach3 is None else self.bootstrap.freedom
    return bootstrap.interval(samples, self.level, freedom)

  def __str__(self) -> str:
    return text.summary(self)

  __repr__ = __str__
