"""The league of forecasters: which rule comes nearest to runs that it has not seen, on public sweeps.

    python experiments/forecasting/league.py --data=FOLDER --cache=forecasts.json

Of every sweep the cheapest 80% of the runs, and then the cheapest 60%, forecast the loss of each dearer run
at its own N and D. A rule that learns (priors, recency, drift) learns from the other sources alone: leave one
source out. Intervals of the other rules count as those of a normal as wide. The log score is the mean ln of
the density that a rule gives to ln L. `--cache` keeps the forecasts of the other rules, which take most of the
time; `--learn` prints the prior of all sources, which `prior_fit.LEARNED` holds.
"""

import argparse
import collections
import json
import pathlib
import sys

import numpy as np
from scipy import optimize, stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import sources

from research.scaling import bootstrap, fitting, law_fit, laws, prior_fit
from research.scaling.options import Options

SHARES = (0.8, 0.6)
# What one learns from when nothing is known: any floor, exponents of .1 to .8, an outer exponent of .5 to 2.
VAGUE = prior_fit.Prior((0.3, -1.1, -1.1, 0.0), (1.5, 0.8, 0.8, 0.7))
RECENCY = (0.5, 0.75, 1.0)
LEAST_REACH = 0.3  # e-folds of C
REPLICATES = 60  # of the bootstraps of the other rules
OURS = 'learned priors'
COORDINATES = [prior_fit.NAMES.index(name) for name in ('ln_E', 'ln_p', 'ln_q', 'ln_gamma')]
NEAREST = 0.15  # no source is taken to be surer of another's parameter than this


def source_of(key: tuple[str, str]) -> str:
  """Two readings of one figure are one source."""
  return 'chinchilla' if key[0] == 'kyo' else key[0]


def splits(sweeps):
  """(name of the split, source, rows to fit, rows to forecast)."""
  for key, seen in sweeps.items():
    for share in SHARES:
      order = np.sort(seen.flops)
      fitted = seen.flops <= order[int(share * len(order)) - 1] * 1.0001
      if fitted.sum() >= 10 and (~fitted).sum() >= 2:
        yield '|'.join(key) + f'|{share}', source_of(key), seen.take(fitted), seen.take(~fitted)


def by_law(law):
  """A rule: the law alone, as it comes from the rows, with a residual bootstrap."""

  def forecast(seen, unseen) -> dict:
    fit = law_fit.fit(law, seen.inputs, seen.loss, check=False)
    at = {'params': unseen.params, 'tokens': unseen.tokens}
    drawn = bootstrap.bootstrap(fit, replicates=REPLICATES)
    values = {name: many[:, None] for name, many in drawn.parameters.items()}
    losses = np.log(law(values, **at))
    losses += np.random.default_rng(0).choice(drawn.spread, losses.shape)
    return told_by(fit.predict(**at), *np.exp(np.percentile(losses, [5, 95], axis=0)), unseen)

  return forecast


def by_mean(seen, unseen) -> dict:
  """A rule: the mean of approaches 2 and 3, with its 90% interval."""
  analysis = fitting.analyse(seen, Options(replicates=REPLICATES, rule='mean of approaches'))
  told = [
    analysis.forecast(c, params=n, tokens=d)
    for n, d, c in zip(unseen.params, unseen.tokens, unseen.flops, strict=True)
  ]
  column = lambda name: np.array([getattr(forecast, name) for forecast in told])
  return told_by(column('loss'), column('loss_low'), column('loss_high'), unseen)


def told_by(loss, low, high, unseen) -> dict:
  """The errors of ln L, and the standard deviation of the normal whose 90% interval is as wide."""
  scale = np.log(high / low) / (2 * stats.norm.ppf(0.95))
  return {'error': np.log(loss / unseen.loss).tolist(), 'scale': scale.tolist()}


OLD = {
  'mean of approaches': by_mean,
  'Chinchilla': by_law(laws.Chinchilla()),
  'GammaChinchilla': by_law(laws.GammaChinchilla()),
}


def learn(fits: dict, without: str | None = None) -> tuple[tuple, tuple]:
  """The prior's means and deviations: every source counts once, by the mean of its sweeps."""
  groups = collections.defaultdict(list)
  for key, fit in fits.items():
    if source_of(key) != without:
      groups[source_of(key)].append(fit.theta[COORDINATES])
  each = np.array([np.mean(members, axis=0) for members in groups.values()])
  # One more source scatters about the mean of these by so much.
  deviation = each.std(0, ddof=1) * np.sqrt(1 + 1 / len(each))
  return tuple(map(float, each.mean(0))), tuple(map(float, np.maximum(deviation, NEAREST)))


def by_priors(every, fits, recency: float) -> dict[str, dict]:
  """Split -> errors, their scale without drift, and reach, with priors of the other sources."""
  told = {}
  for name, source, seen, unseen in every:
    prior = prior_fit.Prior(*learn(fits, source), recency=recency)
    fit = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior, seen.flops)
    middle, scale = fit.predict(unseen.params, unseen.tokens, unseen.flops)
    told[name] = {
      'error': middle - np.log(unseen.loss),
      'scale': scale,
      'reach': np.maximum(np.log(unseen.flops / fit.largest), 0),
    }
  return told


def miss(told: dict) -> float:
  """The median error of the loss, %."""
  return 100 * float(np.median(np.abs(told['error'])))


def over_sources(values: dict[str, float], owner: dict[str, str], without: str | None = None):
  """The mean over sources of the mean over their splits: every source counts once."""
  groups = collections.defaultdict(list)
  for name, value in values.items():
    if owner[name] != without:
      groups[owner[name]].append(value)
  return float(np.mean([np.mean(members) for members in groups.values()]))


def choose(
  tried: dict[float, dict], owner: dict[str, str], without: str | None
) -> tuple[float, float]:
  """(recency, drift) by the other sources: that of the lowest mean error, and the drift seen with it."""
  errors = {r: {name: miss(t) for name, t in tried[r].items()} for r in RECENCY}
  recency = min(RECENCY, key=lambda r: over_sources(errors[r], owner, without))
  return recency, drift_of(tried[recency], owner, without)


def drift_of(told: dict[str, dict], owner: dict[str, str], without: str | None) -> float:
  """The most likely scale of the Student t that the splits' drifts come from.

  A split's drift is the slope of its errors on reach, ln(C / the largest C fitted). The runs of a split share
  it, so that a split counts once and not once for every run. Splits that hardly reach beyond the fitted budgets
  tell nothing of it.
  """
  slopes = {
    name: float(t['error'] @ t['reach'] / (t['reach'] @ t['reach']))
    for name, t in told.items()
    if t['reach'].mean() > LEAST_REACH
  }

  def improbable(ln_scale: float) -> float:
    density = lambda slope: stats.t.logpdf(slope, prior_fit.FREEDOM, scale=np.exp(ln_scale))
    return -over_sources({n: density(slope) for n, slope in slopes.items()}, owner, without)

  found = optimize.minimize_scalar(improbable, bounds=np.log([1e-4, 0.3]), method='bounded')
  return float(np.exp(found.x))


def with_drift(told: dict, drift: float) -> dict:
  return {**told, 'scale': np.hypot(told['scale'], drift * told['reach'])}


def show(results: dict[str, dict[str, dict]], owner: dict[str, str]) -> None:
  """Prints the three tables: errors, coverage by source, coverage and log score of all."""
  names = sorted(set(owner.values()))
  heads = ''.join(f'{name:>12}' for name in names)
  print('median error of the loss, %: the mean over splits, by source; then over all splits')
  print(f'{"rule":20}{heads}{"median":>9}{"mean":>8}')
  for rule, told in results.items():
    cells = [np.mean([miss(told[n]) for n in told if owner[n] == name]) for name in names]
    every = [miss(t) for t in told.values()]
    numbers = ''.join(f'{x:12.2f}' for x in cells)
    print(f'{rule:20}{numbers}{np.median(every):9.2f}{np.mean(every):8.2f}')
  print('share of held-out runs within the 90% interval, %; pooled, within 80% and 50%; log score')
  print(f'{"rule":20}{heads}{"90%":>7}{"80%":>6}{"50%":>6}{"log":>7}')
  for rule, told in results.items():
    freedom = prior_fit.FREEDOM if rule == OURS else np.inf
    far = {n: np.abs(t['error']) / np.array(t['scale']) for n, t in told.items()}
    within = lambda level, name=None, far=far, freedom=freedom: np.mean(
      np.concatenate([x for n, x in far.items() if name in (None, owner[n])])
      <= stats.t.ppf((1 + level) / 2, freedom)
    )
    densities = {
      n: np.mean(stats.t.logpdf(t['error'], freedom, scale=t['scale'])) for n, t in told.items()
    }
    cells = ''.join(f'{100 * within(0.9, name):12.0f}' for name in names)
    pooled = f'{100 * within(0.9):7.0f}{100 * within(0.8):6.0f}{100 * within(0.5):6.0f}'
    print(f'{rule:20}{cells}{pooled}{over_sources(densities, owner):7.2f}')
  counts = collections.Counter()
  for name, told in results[OURS].items():
    counts[owner[name]] += len(told['error'])
  numbers = ''.join(f'{counts[name]:12}' for name in names)
  print(f'{"held-out runs":20}{numbers}{sum(counts.values()):7}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument(
    '--data', required=True, type=pathlib.Path, help='the folder of public tables'
  )
  parser.add_argument('--cache', type=pathlib.Path, help='JSON of the old rules, read and written')
  parser.add_argument('--learn', action='store_true', help='only the prior of all sources')
  flags = parser.parse_args()
  sweeps = sources.load(flags.data)
  fits = {k: prior_fit.fit(s.params, s.tokens, s.loss, VAGUE, s.flops) for k, s in sweeps.items()}
  every = list(splits(sweeps))
  owner = {name: source for name, source, _, _ in every}
  tried = {recency: by_priors(every, fits, recency) for recency in RECENCY}
  if flags.learn:
    mean, deviation = learn(fits)
    recency, drift = choose(tried, owner, None)
    print(prior_fit.Prior(mean, deviation, drift, recency))
    return
  known = json.loads(flags.cache.read_text()) if flags.cache and flags.cache.exists() else {}
  for rule, forecast in OLD.items():
    for name, _, seen, unseen in every:
      if name not in known.setdefault(rule, {}):
        known[rule][name] = forecast(seen, unseen)
        if flags.cache:
          flags.cache.write_text(json.dumps(known))
  learned = {}
  for source in sorted(set(owner.values())):
    recency, drift = choose(tried, owner, source)
    print(f'{source}: without it, recency {recency} and drift {drift:.4f} were learned')
    for name, told in tried[recency].items():
      if owner[name] == source:
        learned[name] = with_drift(told, drift)
  show({OURS: learned, **{rule: known[rule] for rule in OLD}}, owner)


if __name__ == '__main__':
  main()
