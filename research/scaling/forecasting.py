"""Rules that make a forecast of what was fitted; experiments/forecasting compares them."""

from collections.abc import Mapping

import numpy as np

from research.core.errors import UserError, did_you_mean
from research.scaling import bootstrap, planning
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.laws.loss import GammaChinchilla


class Mean:
  """The mean of approaches 2 and 3, unless the sweep's own larger budgets show one of them to be wrong.

  Its size is the geometric mean of theirs: an allocation is a place on a logarithmic axis.
  """

  name = 'mean of approaches'

  def forecast(self, analysis, flops: float, params=None, tokens=None) -> Forecast:
    shares = self.shares(analysis)
    given = params is not None and tokens is not None
    optima = {
      name: (analysis.optimum(flops, name), analysis.optimum_samples(flops, name))
      for name in shares
    }
    losses = {name: (best.loss, np.ravel(many.loss)) for name, (best, many) in optima.items()}
    if given and analysis.approach3 is not None:
      law = analysis.approach3.law(analysis.bootstrap.parameters, params=params, tokens=tokens)
      loss = analysis.predict(params, tokens)
      excess = loss - analysis.optimum(flops).loss  # approach 2 knows only the optimum
      losses = {name: (told + excess, drawn + excess) for name, (told, drawn) in losses.items()}
      losses |= {'approach 3': (loss, np.ravel(law))} if 'approach 3' in shares else {}
    parts = {name: float(told) for name, (told, _) in losses.items()}
    loss = sum(share * parts[name] for name, share in shares.items())
    samples = [mixture([with_noise(analysis, drawn) for _, drawn in losses.values()], shares)]
    if given:
      best = params, tokens
      samples += [np.array([params]), np.array([tokens])]
    else:
      logs = [np.log(optimum[:2]) * shares[name] for name, (optimum, _) in optima.items()]
      best = np.exp(sum(logs))
      for axis in range(2):
        samples.append(mixture([np.ravel(many[axis]) for _, many in optima.values()], shares))
    intervals = [tuple(map(float, analysis.interval(v))) for v in samples]
    return Forecast(
      float(flops), *map(float, best), float(loss), *intervals[0], *intervals[1], *intervals[2],
      analysis.level, self.method(analysis), float(flops / analysis.rows.flops.max()), parts,
    )  # fmt: skip

  def shares(self, analysis) -> dict[str, float]:
    return analysis.shares

  def method(self, analysis) -> str:
    """What the forecast was made by, in words."""
    names = {'approach 2': 'power law through the isoFLOP minima'}
    if analysis.approach3 is not None:
      names['approach 3'] = analysis.approach3.law.name
    shares = self.shares(analysis)
    share = lambda w: f' ({w:.0%})' if len(shares) > 1 else ''
    return ' and '.join(f'{k}, {names[k]}{share(w)}' for k, w in shares.items())


class Law(Mean):
  """The fitted law alone."""

  name = 'law'

  def shares(self, analysis) -> dict[str, float]:
    if analysis.approach3 is None:
      raise NoForecast('No law was fitted; use --rule="power law".')
    return {'approach 3': 1.0}


class PowerLaw(Mean):
  """The power law through the isoFLOP minima alone."""

  name = 'power law'

  def shares(self, analysis) -> dict[str, float]:
    if analysis.approach2 is None:
      raise NoForecast('No isoFLOP minima were found; use --rule=law.')
    return {'approach 2': 1.0}


class Learned:
  """A law with an outer exponent, priors from other public sweeps, and more weight on the larger budgets."""

  name = 'learned priors'

  def forecast(self, analysis, flops: float, params=None, tokens=None) -> Forecast:
    fit = analysis.learned
    law, level = GammaChinchilla(), analysis.level
    if params is None or tokens is None:
      values = fit.natural(fit.theta)
      drawn = {name: v[:, None] for name, v in fit.natural(fit.draws()).items()}
      best = planning.optimum(law, values, flops, analysis.cost)[:2]
      many = planning.optimum(law, drawn, np.array([flops]), analysis.cost)[:2]
      spans = [tuple(map(float, bootstrap.interval(v[:, 0], level))) for v in many]
    else:
      best = params, tokens
      spans = [(float(value), float(value)) for value in best]
    n, d = map(float, best)
    if not np.isfinite([n, d]).all():
      raise NoForecast('The law has no optimum at this budget; ask for a run, params and tokens.')
    low, high = fit.interval(n, d, level, flops)
    return Forecast(
      flops, n, d, float(np.exp(fit.predict(n, d, flops)[0][0])), float(low[0]), float(high[0]),
      *spans[0], *spans[1], level, self.method(analysis), float(flops / analysis.rows.flops.max()),
    )  # fmt: skip

  def method(self, analysis) -> str:
    return 'GammaChinchilla with priors learned from public sweeps'


RULES: Mapping = {rule.name: rule for rule in (Learned(), Mean(), Law(), PowerLaw())}
DEFAULT = 'learned priors'


def check(name: str) -> None:
  """Raises UserError for a rule that there is not."""
  if name not in RULES:
    raise UserError(f'There is no rule {name!r}.{did_you_mean(name, RULES)}')


def list_rules() -> str:
  """Every rule and what it does, one a line."""
  lines = []
  for name, rule in RULES.items():
    mark = ' (default)' if name == DEFAULT else ''
    lines.append(f'{name + mark:32s} {type(rule).__doc__.strip().splitlines()[0]}')
  return '\n'.join(lines)


def with_noise(analysis, losses: np.ndarray) -> np.ndarray:
  """Adds a run's own scatter to bootstrapped losses."""
  if analysis.approach3 is None:
    return losses
  drawn = np.random.default_rng(0).choice(analysis.bootstrap.spread, size=losses.shape)
  log = analysis.approach3.problem.residuals == 'log'
  return losses * np.exp(drawn) if log else losses + drawn


def mixture(drawn: list[np.ndarray], shares: Mapping[str, float], size: int = 4000) -> np.ndarray:
  """Draws from several samples in proportion to their shares."""
  if len(drawn) == 1:
    return drawn[0]
  rng = np.random.default_rng(0)
  parts = [rng.choice(x, round(size * w)) for x, w in zip(drawn, shares.values(), strict=True)]
  return np.concatenate(parts)
