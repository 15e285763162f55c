"""The league of forecasters: which rule forecasts held-out runs of public sweeps best.

    python experiments/forecasting/league.py --data=FOLDER --cache=forecasts.json

In every sweep the cheapest 80% of the runs, and then the cheapest 60%, forecast the loss of each more
expensive run at its own N and D. A rule that learns (priors, recency, drift) learns from the other sources:
leave one source out. Intervals of the other rules count as those of a normal of the same width. The log
score is the mean ln of the density that a rule gives to ln L. `--cache` keeps the forecasts of the other rules,
which take most of the time; `--learn` prints the prior of all sources, which is `prior_fit.LEARNED`.
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
# The prior without any knowledge: any floor, exponents of .1 to .8, an outer exponent of .5 to 2.
VAGUE = prior_fit.Prior((0.3, -1.1, -1.1, 0.0), (1.5, 0.8, 0.8, 0.7))
RECENCY = (0.5, 0.75, 1.0)
LEAST_REACH = 0.3  # e-folds of C
REPLICATES = 60  # of the bootstraps of the other rules
OURS = 'learned priors'
COORDINATES = [prior_fit.NAMES.index(name) for name in ('ln_E', 'ln_p', 'ln_q', 'ln_gamma')]
NEAREST = 0.15  # the least standard deviation of a learned prior


def source_of(key: tuple[str, str]) -> str:
  """The source of a sweep. Two readings of one figure are one source."""
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
  """The rule that fits a law alone, with a residual bootstrap."""

  def forecast(seen, unseen) -> dict:
    fit = law_fit.fit(law, seen.inputs, seen.loss, check=False)
    point = {'params': unseen.params, 'tokens': unseen.tokens}
    samples = bootstrap.bootstrap(fit, replicates=REPLICATES)
    values = {name: replicates[:, None] for name, replicates in samples.parameters.items()}
    losses = np.log(law(values, **point))
    losses += np.random.default_rng(0).choice(samples.spread, losses.shape)
    low, high = np.exp(np.percentile(losses, [5, 95], axis=0))
    return record_of(fit.predict(**point), low, high, unseen)

  return forecast


def by_mean(seen, unseen) -> dict:
  """The rule that takes the mean of approaches 2 and 3, with its 90% interval."""
  analysis = fitting.analyse(seen, Options(replicates=REPLICATES, rule='mean of approaches'))
  points = zip(unseen.params, unseen.tokens, unseen.flops, strict=True)
  forecasts = [analysis.forecast(c, params=n, tokens=d) for n, d, c in points]
  names = ('loss', 'loss_low', 'loss_high')
  columns = [np.array([getattr(forecast, name) for forecast in forecasts]) for name in names]
  return record_of(*columns, unseen)


def record_of(loss, low, high, unseen) -> dict:
  """The errors of ln L, and the standard deviation of the normal with the same 90% interval."""
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
  means = np.array([np.mean(members, axis=0) for members in groups.values()])
  # The scatter of one more source about the mean of these.
  deviation = means.std(0, ddof=1) * np.sqrt(1 + 1 / len(means))
  return tuple(map(float, means.mean(0))), tuple(map(float, np.maximum(deviation, NEAREST)))


def by_priors(every, fits, recency: float) -> dict[str, dict]:
  """The records of all splits with priors of the other sources: errors, scale without drift, and reach."""
  records = {}
  for name, source, seen, unseen in every:
    prior = prior_fit.Prior(*learn(fits, source), recency=recency)
    fit = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior, seen.flops)
    middle, scale = fit.predict(unseen.params, unseen.tokens, unseen.flops)
    records[name] = {
      'error': middle - np.log(unseen.loss),
      'scale': scale,
      'reach': np.maximum(np.log(unseen.flops / fit.largest), 0),
    }
  return records


def median_error(record: dict) -> float:
  """The median error of the loss, %."""
  return 100 * float(np.median(np.abs(record['error'])))


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

  def mean_error(recency: float) -> float:
    errors = {name: median_error(record) for name, record in tried[recency].items()}
    return over_sources(errors, owner, without)

  recency = min(RECENCY, key=mean_error)
  return recency, drift_of(tried[recency], owner, without)


def drift_of(records: dict[str, dict], owner: dict[str, str], without: str | None) -> float:
  """The maximum-likelihood scale of the Student t from which the splits' drifts come.

  A split's drift is the slope of its errors on reach, ln(C / the largest C fitted). The runs of a split share
  it, so that a split counts once and not once for every run. Splits that hardly reach beyond the fitted budgets
  say nothing about it.
  """
  slopes = {}
  for name, record in records.items():
    reach = record['reach']
    if reach.mean() > LEAST_REACH:
      slopes[name] = float(record['error'] @ reach / (reach @ reach))

  def negative_log_likelihood(ln_scale: float) -> float:
    densities = {
      name: stats.t.logpdf(slope, prior_fit.FREEDOM, scale=np.exp(ln_scale))
      for name, slope in slopes.items()
    }
    return -over_sources(densities, owner, without)

  bounds = np.log([1e-4, 0.3])
  best = optimize.minimize_scalar(negative_log_likelihood, bounds=bounds, method='bounded')
  return float(np.exp(best.x))


def with_drift(record: dict, drift: float) -> dict:
  return {**record, 'scale': np.hypot(record['scale'], drift * record['reach'])}


def coverage(records: list[dict], level: float, freedom: float) -> float:
  """The share of held-out runs within the interval of a level, %."""
  distances = [np.abs(record['error']) / np.array(record['scale']) for record in records]
  return 100 * np.mean(np.concatenate(distances) <= stats.t.ppf((1 + level) / 2, freedom))


def show(results: dict[str, dict[str, dict]], owner: dict[str, str]) -> None:
  """Prints the three tables: errors, coverage by source, coverage and log score of all."""
  names = sorted(set(owner.values()))
  heads = ''.join(f'{name:>12}' for name in names)
  print('median error of the loss, %: the mean over splits, by source; then over all splits')
  print(f'{"rule":20}{heads}{"median":>9}{"mean":>8}')
  for rule, records in results.items():
    errors = {split: median_error(record) for split, record in records.items()}
    cells = [np.mean([errors[n] for n in errors if owner[n] == name]) for name in names]
    numbers = ''.join(f'{x:12.2f}' for x in cells)
    every = list(errors.values())
    print(f'{rule:20}{numbers}{np.median(every):9.2f}{np.mean(every):8.2f}')
  print('share of held-out runs within the 90% interval, %; pooled, within 80% and 50%; log score')
  print(f'{"rule":20}{heads}{"90%":>7}{"80%":>6}{"50%":>6}{"log":>7}')
  for rule, records in results.items():
    freedom = prior_fit.FREEDOM if rule == OURS else np.inf
    densities = {
      split: np.mean(stats.t.logpdf(record['error'], freedom, scale=record['scale']))
      for split, record in records.items()
    }
    cells = ''.join(
      f'{coverage([r for n, r in records.items() if owner[n] == name], 0.9, freedom):12.0f}'
      for name in names
    )
    every = list(records.values())
    pooled = f'{coverage(every, 0.9, freedom):7.0f}{coverage(every, 0.8, freedom):6.0f}'
    pooled += f'{coverage(every, 0.5, freedom):6.0f}'
    print(f'{rule:20}{cells}{pooled}{over_sources(densities, owner):7.2f}')
  counts = collections.Counter()
  for name, record in results[OURS].items():
    counts[owner[name]] += len(record['error'])
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
  fits = {
    key: prior_fit.fit(seen.params, seen.tokens, seen.loss, VAGUE, seen.flops)
    for key, seen in sweeps.items()
  }
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
    for name, record in tried[recency].items():
      if owner[name] == source:
        learned[name] = with_drift(record, drift)
  show({OURS: learned, **{rule: known[rule] for rule in OLD}}, owner)


if __name__ == '__main__':
  main()
