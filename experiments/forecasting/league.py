"""The league of forecasters: which rule comes nearest to runs that it has not seen, on public sweeps.

    python experiments/forecasting/league.py --data=FOLDER --cache=forecasts.json

Of every sweep the cheapest 80% of the runs, and then the cheapest 60%, forecast the loss of each dearer run
at its own N and D. A rule that learns (priors, recency, drift) learns from the other sources alone: leave one
source out. `--cache` keeps the forecasts of the other rules, which take a quarter of an hour of CPU; `--learn`
prints the prior of all sources, which `prior_fit.LEARNED` holds.
"""

import argparse
import collections
import json
import pathlib
import sys

import numpy as np
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import sources

from research.scaling import fitting, law_fit, laws, prior_fit

SHARES = (0.8, 0.6)
# What one learns from when nothing is known: any floor, exponents of .1 to .8, an outer exponent of .5 to 2.
VAGUE = prior_fit.Prior((0.3, -1.1, -1.1, 0.0), (1.5, 0.8, 0.8, 0.7))
RECENCY = (0.5, 0.75, 1.0)
DRIFT = (0.0, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.02, 0.03)
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
  """A rule: the law alone, as it comes from the rows."""

  def forecast(seen, unseen) -> dict:
    fit = law_fit.fit(law, seen.inputs, seen.loss, check=False)
    return {
      'error': np.log(
        fit.predict(params=unseen.params, tokens=unseen.tokens) / unseen.loss
      ).tolist()
    }

  return forecast


def by_mean(seen, unseen) -> dict:
  """A rule: the mean of approaches 2 and 3, with its 90% interval."""
  analysis = fitting.analyse(seen, fitting.Options(replicates=60, rule='mean of approaches'))
  told = [
    analysis.forecast(c, params=n, tokens=d)
    for n, d, c in zip(unseen.params, unseen.tokens, unseen.flops, strict=True)
  ]
  inside = [f.loss_low <= x <= f.loss_high for f, x in zip(told, unseen.loss, strict=True)]
  return {
    'error': [float(np.log(f.loss / x)) for f, x in zip(told, unseen.loss, strict=True)],
    'inside': [bool(x) for x in inside],
  }


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
  """Split -> errors, deviations without drift, and reach, with priors of the other sources."""
  told = {}
  for name, source, seen, unseen in every:
    prior = prior_fit.Prior(*learn(fits, source), recency=recency)
    fit = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior, seen.flops)
    middle, deviation = fit.predict(unseen.params, unseen.tokens, unseen.flops)
    told[name] = {
      'error': (middle - np.log(unseen.loss)).tolist(),
      'deviation': deviation.tolist(),
      'reach': np.maximum(np.log(unseen.flops / fit.largest), 0).tolist(),
      'freedom': max(len(seen) - 6, 3),
    }
  return told


def inside(told: dict, drift: float, level: float = 0.9) -> np.ndarray:
  """Which held-out runs lie within the interval."""
  error, deviation, reach = (np.array(told[k]) for k in ('error', 'deviation', 'reach'))
  half = stats.t.ppf((1 + level) / 2, told['freedom']) * np.hypot(deviation, drift * reach)
  return np.abs(error) <= half


def miss(told: dict) -> float:
  return 100 * float(np.median(np.abs(told['error'])))


def choose(
  tried: dict[float, dict], owner: dict[str, str], without: str | None
) -> tuple[float, float]:
  """(recency, drift): of the lowest mean error over sources, and the least that covers 90% of their runs."""

  def mean(values: dict[str, float]) -> float:
    groups = collections.defaultdict(list)
    for name, value in values.items():
      if owner[name] != without:
        groups[owner[name]].append(value)
    return float(np.mean([np.mean(members) for members in groups.values()]))

  recency = min(RECENCY, key=lambda r: mean({name: miss(t) for name, t in tried[r].items()}))
  covers = lambda drift: mean({n: inside(t, drift).mean() for n, t in tried[recency].items()})
  return recency, next((drift for drift in DRIFT if covers(drift) >= 0.9), DRIFT[-1])


def show(results: dict[str, dict[str, dict]], owner: dict[str, str]) -> None:
  names = sorted(set(owner.values()))
  print(
    'median error of the loss at held-out runs, %: the mean over splits, by source; then over all splits'
  )
  print(f'{"rule":20}' + ''.join(f'{name:>12}' for name in names) + f'{"median":>9}{"mean":>8}')
  for rule, told in results.items():
    cells = [np.mean([miss(told[n]) for n in told if owner[n] == name]) for name in names]
    every = [miss(t) for t in told.values()]
    print(
      f'{rule:20}'
      + ''.join(f'{x:12.2f}' for x in cells)
      + f'{np.median(every):9.2f}{np.mean(every):8.2f}'
    )
  print('share of held-out runs within the 90% interval, %; then pooled')
  for rule, told in results.items():
    if not all('inside' in t for t in told.values()):
      continue
    within = {
      name: np.concatenate([t['inside'] for n, t in told.items() if owner[n] == name])
      for name in names
    }
    pooled = np.concatenate(list(within.values()))
    print(
      f'{rule:20}'
      + ''.join(f'{100 * x.mean():12.0f}' for x in within.values())
      + f'{100 * pooled.mean():9.0f}'
    )
  counts = collections.Counter()
  some = next(iter(results.values()))
  for name, told in some.items():
    counts[owner[name]] += len(told['error'])
  print(
    f'{"held-out runs":20}'
    + ''.join(f'{counts[name]:12}' for name in names)
    + f'{sum(counts.values()):9}'
  )


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
    print(f'{source}: without it, recency {recency} and drift {drift} were chosen')
    for name, told in tried[recency].items():
      if owner[name] == source:
        learned[name] = {**told, 'inside': inside(told, drift).tolist()}
  show({'learned priors': learned, **{rule: known[rule] for rule in OLD}}, owner)


if __name__ == '__main__':
  main()
