"""Rules that make a forecast from an analysis. experiments/forecasting compares them."""

from collections.abc import Mapping

import numpy as np

from research.core.errors import UserError, did_you_mean
from research.scaling import bootstrap, planning
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.laws.loss import GammaChinchilla


class Mean:
  """The mean of approaches 2 and 3, unless the sweep's own larger budgets show one of them to be wrong.

  Its size is the geometric mean of theirs, since an allocation is a place on a logarithmic axis.
  """

  name = 'mean of approaches'

  def forecast(self, analysis, flops: float, params=None, tokens=None) -> Forecast:
    """The forecast at the optimum of `flops`, or of a run of `params` and `tokens` that costs `flops`."""
    shares = self.shares(analysis)
    names_run = params is not None and tokens is not None
    optima = {name: analysis.optimum(flops, name) for name in shares}
    samples = {name: analysis.optimum_samples(flops, name) for name in shares}
    losses = {name: optima[name].loss for name in shares}
    drawn = {name: np.ravel(samples[name].loss) for name in shares}
    if names_run and analysis.approach3 is not None:
      loss = analysis.predict(params, tokens)
      # Approach 2 knows only the optimum: the law says how much a run beside it loses.
      excess = loss - analysis.optimum(flops).loss
      losses = {name: value + excess for name, value in losses.items()}
      drawn = {name: values + excess for name, values in drawn.items()}
      if 'approach 3' in shares:
        replicates = analysis.bootstrap.parameters
        losses['approach 3'] = loss
        drawn['approach 3'] = np.ravel(
          analysis.approach3.law(replicates, params=params, tokens=tokens)
        )
    parts = {name: float(loss) for name, loss in losses.items()}
    loss = sum(share * parts[name] for name, share in shares.items())
    noisy = [with_noise(analysis, values) for values in drawn.values()]
    spans = [analysis.interval(mixture(noisy, shares))]
    if names_run:
      best = params, tokens
      spans += [(params, params), (tokens, tokens)]
    else:
      best = np.exp(sum(np.log(optima[name][:2]) * share for name, share in shares.items()))
      for field in ('params', 'tokens'):
        sizes = [np.ravel(getattr(samples[name], field)) for name in shares]
        spans.append(analysis.interval(mixture(sizes, shares)))
    spans = [(float(low), float(high)) for low, high in spans]
    return Forecast(
      float(flops), *map(float, best), float(loss), *spans[0], *spans[1], *spans[2],
      analysis.level, self.method(analysis), float(flops / analysis.rows.flops.max()), parts,
      float(flops / analysis.rows.flops.min()),
    )  # fmt: skip

  def shares(self, analysis) -> dict[str, float]:
    """The share of each approach in the mean; they sum to one."""
    return analysis.shares

  def method(self, analysis) -> str:
    """The method of the forecast, in words."""
    names = {'approach 2': 'power law through the isoFLOP minima'}
    if analysis.approach3 is not None:
      names['approach 3'] = analysis.approach3.law.name
    shares = self.shares(analysis)
    if len(shares) == 1:
      return ''.join(f'{name}, {names[name]}' for name in shares)
    return ' and '.join(f'{name}, {names[name]} ({share:.0%})' for name, share in shares.items())


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
      raise NoForecast('No isoFLOP minima were fitted; use --rule=law.')
    return {'approach 2': 1.0}


class Learned:
  """A law with an outer exponent, priors from other public sweeps, and more weight on the larger budgets."""

  name = 'learned priors'

  def forecast(self, analysis, flops: float, params=None, tokens=None) -> Forecast:
    """The forecast at the optimum of `flops`, or of a run of `params` and `tokens` that costs `flops`."""
    fit = analysis.learned
    law = GammaChinchilla()
    level = analysis.level
    if params is None or tokens is None:
      best = planning.optimum(law, fit.natural(fit.theta), flops, analysis.cost)[:2]
      drawn = {name: values[:, None] for name, values in fit.natural(fit.draws()).items()}
      sizes = planning.optimum(law, drawn, np.array([flops]), analysis.cost)[:2]
      spans = [tuple(map(float, bootstrap.interval(size[:, 0], level))) for size in sizes]
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
      of_smallest=float(flops / analysis.rows.flops.min()),
    )  # fmt: skip

  def method(self, analysis) -> str:
    """The method of the forecast, in words."""
    return 'GammaChinchilla with priors learned from public sweeps'


RULES: Mapping = {rule.name: rule for rule in (Learned(), Mean(), Law(), PowerLaw())}
DEFAULT = 'learned priors'


def check(name: str, holds: tuple[str, ...] = ()) -> None:
  """Raises UserError for an unknown rule, or for one that ignores the parameters that the fit `holds`."""
  if name not in RULES:
    raise UserError(f'There is no rule {name!r}.{did_you_mean(name, RULES)}')
  if holds and name == Learned.name:
    raise UserError(
      f'--rule="{name}" fits a law of its own, which does not hold {", ".join(holds)}; '
      'leave out --fix and --tie, or name --rule=law.'
    )


def list_rules() -> str:
  """Every rule and what it does, one a line; the first line of a rule's docstring says it."""
  lines = []
  for name, rule in RULES.items():
    mark = ' (default)' if name == DEFAULT else ''
    lines.append(f'{name + mark:32s} {type(rule).__doc__.strip().splitlines()[0]}')
  return '\n'.join(lines)


def with_noise(analysis, losses: np.ndarray) -> np.ndarray:
  """Bootstrapped losses, each with the residual of a row drawn at random: the scatter of one new run."""
  if analysis.approach3 is None:
    return losses
  drawn = np.random.default_rng(0).choice(analysis.bootstrap.spread, size=losses.shape)
  log = analysis.approach3.problem.residuals == 'log'
  return losses * np.exp(drawn) if log else losses + drawn


def mixture(drawn: list[np.ndarray], shares: Mapping[str, float], size: int = 4000) -> np.ndarray:
  """`size` draws from several samples in proportion to their shares; a sample alone as it is."""
  if len(drawn) == 1:
    return drawn[0]
  rng = np.random.default_rng(0)
  parts = [rng.choice(x, round(size * w)) for x, w in zip(drawn, shares.values(), strict=True)]
  return np.concatenate(parts)
