"""What a set of rows says: the approaches that were fitted, their forecasts, and what to doubt.

`research.scaling.plot`, `save` and `load` draw an analysis and keep it in a file.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError
from research.scaling import allocation, bootstrap, fitted, planning, rollout, text
from research.scaling import rows as table
from research.scaling.cost import Cost


class NoForecast(UserError, ValueError):
  """Neither a law nor two isoFLOP minima: nothing to forecast with. The message gives every reason."""


class Optimum(NamedTuple):
  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a run at `flops` should reach; intervals at `level`, that of the loss for one new run with its noise.

  `extrapolation` is flops over the largest budget that was fitted. Where both approaches 2 and 3 were found the
  loss is their mean weighed by how well each forecast the sweep's own larger budgets; `parts` has each one's.
  """

  flops: float
  params: float
  tokens: float
  loss: float
  loss_low: float
  loss_high: float
  params_low: float
  params_high: float
  tokens_low: float
  tokens_high: float
  level: float
  method: str
  extrapolation: float
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def error(self, outcome: float) -> float:
    """(forecast - outcome) / outcome."""
    return self.loss / outcome - 1

  def __str__(self) -> str:
    return (
      f'C = {self.flops:.3g} ({self.extrapolation:.2g}x the largest fitted): '
      f'N* = {self.params:.3g} [{self.params_low:.3g}, {self.params_high:.3g}], '
      f'D* = {self.tokens:.3g} [{self.tokens_low:.3g}, {self.tokens_high:.3g}], '
      f'loss {self.loss:.4f} [{self.loss_low:.4f}, {self.loss_high:.4f}] ({self.method})'
    )


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Everything a set of rows says about N*(C), D*(C) and the loss.

  `approach1`, `approach2`, `approach3` are None where refused; `refusals` says why, by name.
  `cost` is the rows' FLOP convention, `level` that of every interval.
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

  @functools.cached_property
  def trials(self) -> tuple[rollout.RollOut, ...]:
    """Forecasts of the larger budgets from the smaller ones: which approach is not fit to forecast with."""
    if self.approach2 is None or self.approach3 is None:
      return ()
    return rollout.roll_out(self.rows, self.cost, self.approach2, self.approach3)

  @property
  def shares(self) -> dict[str, float]:
    """What share each approach has in a forecast; they sum to one."""
    both = {'approach 2': self.approach2, 'approach 3': self.approach3}
    have = [name for name, found in both.items() if found is not None]
    found = rollout.shares(self.trials, have)
    return {name: share for name, share in found.items() if share}

  @property
  def method(self) -> str:
    names = {'approach 2': 'power law through the isoFLOP minima'}
    if self.approach3 is not None:
      names['approach 3'] = self.approach3.law.name
    share = lambda w: f' ({w:.0%})' if len(self.shares) > 1 else ''
    return ' and '.join(f'{k}, {names[k]}{share(w)}' for k, w in self.shares.items())

  def predict(self, params, tokens) -> np.ndarray:
    """The fitted loss in nats per token; raises NoForecast without a law of N and D."""
    if self.approach3 is None:
      raise NoForecast(
        f'No law of N and D was fitted: {self.refusals.get("approach 3", "not asked for")}'
      )
    return self.approach3.predict(params=params, tokens=tokens)

  def optimum(self, flops) -> Optimum:
    """Compute-optimal N*, D* and their loss at a budget or an array of them."""
    if self.approach3 is not None:
      law, values = self.approach3.law, self.approach3.parameters
      return Optimum(*planning.optimum(law, values, flops, self.cost))
    two = self.approach2
    flops = np.asarray(flops, np.float64)
    return Optimum(two.params(flops), two.tokens(flops), two.loss(flops))

  def optimum_samples(self, flops) -> Optimum:
    """The optimum under every bootstrap replicate, [replicates, budgets] each."""
    flops = np.atleast_1d(np.asarray(flops, np.float64))
    if self.approach3 is not None:
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
    """The loss at the optimum of `flops`, or of a run of given `params` and `tokens`.

    Where two approaches have a share, the loss is their mean, and N* and D* their geometric means.
    """
    given = params is not None and tokens is not None
    if not given and flops is None:
      raise NoForecast('forecast needs flops, or params and tokens.')
    if given:
      flops = float(self.cost.flops(params, tokens)) if flops is None else float(flops)
    shares, optima = self.shares, {}
    for name in shares:
      part = self if name == 'approach 3' else dataclasses.replace(self, approach3=None)
      optima[name] = part.optimum(flops), part.optimum_samples(flops)
    losses = {name: (best.loss, np.ravel(many.loss)) for name, (best, many) in optima.items()}
    if given and self.approach3 is not None:
      law = self.approach3.law(self.bootstrap.parameters, params=params, tokens=tokens)
      loss = self.predict(params, tokens)
      excess = loss - self.optimum(flops).loss  # approach 2 knows only the optimum
      losses = {name: (own + excess, drawn + excess) for name, (own, drawn) in losses.items()}
      losses |= {'approach 3': (loss, np.ravel(law))} if 'approach 3' in shares else {}
    parts = {name: float(own) for name, (own, _) in losses.items()}
    loss = sum(share * parts[name] for name, share in shares.items())
    samples = [_mixture([self._with_noise(drawn) for _, drawn in losses.values()], shares)]
    if given:
      best = params, tokens
      samples += [np.array([params]), np.array([tokens])]
    else:
      # An allocation is a place on a logarithmic axis: approach 3's own is no better than its loss.
      logs = [np.log(optimum[:2]) * shares[name] for name, (optimum, _) in optima.items()]
      best = np.exp(sum(logs))
      for axis in range(2):
        drawn = [np.ravel(many[axis]) for _, many in optima.values()]
        samples.append(_mixture(drawn, shares))
    intervals = [tuple(map(float, self.interval(v))) for v in samples]
    return Forecast(
      float(flops),
      *map(float, best),
      float(loss),
      *intervals[0],
      *intervals[1],
      *intervals[2],
      self.level,
      self.method,
      float(flops / self.rows.flops.max()),
      parts,
    )

  def _with_noise(self, losses: np.ndarray) -> np.ndarray:
    """Adds a run's own scatter to bootstrapped losses."""
    if self.approach3 is None:
      return losses
    drawn = np.random.default_rng(0).choice(self.bootstrap.spread, size=losses.shape)
    return losses * np.exp(drawn) if self.approach3.problem.residuals == 'log' else losses + drawn

  def interval(self, samples: np.ndarray) -> tuple:
    """At `level`, over the first axis of values [replicates, ...] such as `optimum_samples` has."""
    freedom = np.inf if self.approach3 is None else self.bootstrap.freedom
    return bootstrap.interval(samples, self.level, freedom)

  def __str__(self) -> str:
    return text.summary(self)

  __repr__ = __str__


def _mixture(drawn: list[np.ndarray], shares: Mapping[str, float], size: int = 4000) -> np.ndarray:
  """Draws from several samples in proportion to their shares."""
  if len(drawn) == 1:
    return drawn[0]
  rng = np.random.default_rng(0)
  return np.concatenate(
    [rng.choice(x, round(size * w)) for x, w in zip(drawn, shares.values(), strict=True)]
  )
