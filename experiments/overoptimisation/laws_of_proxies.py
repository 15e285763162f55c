"""The points of the study, the laws of Gao et al. (2022) through them, the forecast and the figure."""

import json
import pathlib

import numpy as np

from research.core import storage
from research.scaling import bootstrap, fit
from research.scaling.laws import BestOfNReward, ReinforcementReward
from research.scaling.report.figure import MARKERS, new_figure

REPLICATES = 400  # of a bootstrap
LAWS = {'best of n': BestOfNReward(), 'reinforcement': ReinforcementReward()}


def points(workdir: pathlib.Path, plan: dict) -> list[dict]:
  """A row for each n, and for each evaluation of a policy, of what is there.

  `gold` is above the base policy's mean; `proxy` likewise, in standard deviations of its scores there.
  """
  rows = []
  for width in plan['widths']:
    for pairs in plan['pairs']:
      path = workdir / f'best_of-{width}-{pairs}.json'
      if not path.is_file():
        continue
      best = json.loads(path.read_text())
      trained = json.loads((workdir / f'proxy-{width}-{pairs}' / 'run.json').read_text())
      cell = {
        'width': width, 'params': trained['params_total'], 'pairs': pairs,
        'accuracy': round(trained['accuracy'], 4), 'correlation': round(best['correlation'], 4),
      }  # fmt: skip
      measured = [('best of n', row['n'], row) for row in best['rows']]
      for row in judged(workdir / f'policy-{width}-{pairs}'):
        measured.append(('reinforcement', row['step'], row))
      start = best['rows'][0]
      for method, at, row in measured:
        rows.append({
          'method': method, **cell, 'at': at, 'kl': max(row['kl'], 0.0),
          'gold': row['gold'] - start['gold'],
          'proxy': (row['proxy'] - start['proxy']) / best['deviation'],
        })  # fmt: skip
  return rows


def judged(workdir: pathlib.Path) -> list[dict]:
  """The evaluations of a policy: step, kl, gold, proxy. None of a run that has not finished."""
  if not (workdir / 'run.json').is_file():
    return []
  run = json.loads((workdir / 'run.json').read_text())
  rows = [*storage.read_rows(workdir / 'metrics.jsonl'), {**run, 'step': run['steps']}]
  names = ('kl', 'gold', 'proxy')
  found = {}
  for row in rows:
    if 'eval/judged/kl' in row:
      found[row['step']] = {name: row[f'eval/judged/{name}'] for name in names}
  return [{'step': step, **found[step]} for step in sorted(found)]


def of_cell(rows: list[dict], method: str, width: int, pairs: int) -> list[dict]:
  """The rows of one proxy and one method."""
  wanted = (method, width, pairs)
  return [row for row in rows if (row['method'], row['width'], row['pairs']) == wanted]


def fitted(method: str, rows: list[dict], replicates: int = 0) -> dict:
  """{a, b, params} of the method's law; b is 0 at the least.

  With replicates also the 90% intervals of a and b, which take the points as independent.
  """
  kl = np.array([row['kl'] for row in rows])
  values = np.array([row['gold'] for row in rows])
  result = fit(LAWS[method], {'kl': kl}, values, check=False)
  found = {'a': result.parameters['a'], 'b': result.parameters['b'], 'params': rows[0]['params']}
  if replicates:
    intervals = bootstrap.bootstrap(result, replicates=replicates).intervals()
    for name in ('a', 'b'):
      found[f'{name}_low'], found[f'{name}_high'] = intervals[name]
  return found


def fits(rows: list[dict]) -> list[dict]:
  """A row for each proxy and method: the law's a and b, and where gold was measured to be highest and last."""
  table = []
  for method in LAWS:
    for width, pairs in sorted({(row['width'], row['pairs']) for row in rows}):
      cell = of_cell(rows, method, width, pairs)
      if len(cell) < 3:
        continue
      law = fitted(method, cell, REPLICATES)
      top = max(cell, key=lambda row: row['gold'])
      table.append({
        'method': method, 'width': width, 'params': law['params'], 'pairs': pairs,
        'accuracy': cell[0]['accuracy'], 'a': law['a'], 'a_low': law['a_low'], 'a_high': law['a_high'],
        'b': law['b'], 'b_low': law['b_low'], 'b_high': law['b_high'],
        'peak_kl': top['kl'], 'peak_gold': top['gold'],
        'last_kl': cell[-1]['kl'], 'last_gold': cell[-1]['gold'], 'last_proxy': cell[-1]['proxy'],
      })  # fmt: skip
  return table


def forecast(rows: list[dict], largest: pathlib.Path, middle: int) -> list[dict]:
  """a and b of the largest proxy, on lines in ln(parameters) through those of the smaller ones.

  Of the largest proxy, whose workdir is `largest`, only the number of parameters is read.
  """
  params = json.loads((largest / 'run.json').read_text())['params_total']
  smaller = [row for row in fits(rows) if row['pairs'] == middle and row['params'] < params]
  table = []
  for method in LAWS:
    laws = [row for row in smaller if row['method'] == method]
    sizes = np.log([row['params'] for row in laws])
    values = {}
    for name in ('a', 'b'):
      line = np.polyfit(sizes, [row[name] for row in laws], 1)
      values[name] = max(float(np.polyval(line, np.log(params))), 0.0)
    table.append({'method': method, **values})
  return table


def outcome(registered: list[dict], rows: list[dict], largest: int, middle: int) -> list[dict]:
  """Forecast beside measurement: the highest gold within the measured KL, and gold at the end."""
  table = []
  for law in registered:
    cell = of_cell(rows, law['method'], largest, middle)
    kl = np.array([row['kl'] for row in cell])
    gold = np.array([row['gold'] for row in cell])
    expected = curve(law['method'], law, kl)
    found = fitted(law['method'], cell)
    table.append({
      'method': law['method'], 'a_forecast': law['a'], 'a': found['a'],
      'b_forecast': law['b'], 'b': found['b'],
      'peak_forecast': float(expected.max()), 'peak': float(gold.max()),
      'peak_kl_forecast': float(kl[expected.argmax()]), 'peak_kl': float(kl[gold.argmax()]),
      'last_forecast': float(expected[kl.argmax()]), 'last': float(gold[kl.argmax()]),
      'last_kl': float(kl.max()),
    })  # fmt: skip
  return table


def curve(method: str, law: dict, kl: np.ndarray) -> np.ndarray:
  """The law's gold reward at `kl`."""
  return LAWS[method]({'a': law['a'], 'b': law['b']}, kl=kl)


def draw(rows: list[dict], table: list[dict], plan: dict, path: pathlib.Path) -> None:
  """Gold (marks), its law (line) and proxy (dashed) against the square root of KL, by method and factor."""
  figure, axes = new_figure(columns=2, rows=2, size=(5.6, 4.2))
  panels = [(method, factor) for factor in ('width', 'pairs') for method in LAWS]
  for ax, (method, factor) in zip(axes, panels, strict=True):
    cells = [row for row in table if row['method'] == method and shown(row, factor, plan)]
    for i, law in enumerate(cells):
      cell = of_cell(rows, method, law['width'], law['pairs'])
      d = np.sqrt([row['kl'] for row in cell])
      color = f'C{i}'
      label = f'{law["params"]:,} parameters' if factor == 'width' else f'{law["pairs"]:,} pairs'
      gold = [row['gold'] for row in cell]
      ax.plot(d, gold, MARKERS[i % len(MARKERS)], color=color, markersize=4, label=label)
      grid = np.linspace(0, d.max(), 100)
      ax.plot(grid, curve(method, law, grid**2), color=color)
      ax.plot(d, [row['proxy'] for row in cell], '--', color=color, linewidth=0.9, alpha=0.7)
    ax.axhline(0, color='k', linewidth=0.6)
    fixed = f'{plan["middle"]:,} pairs' if factor == 'width' else f'width {plan["widths"][-2]}'
    ax.set_title(f'{method}, proxies of {fixed}', fontsize=10)
    ax.set_xlabel('square root of KL from the base policy, nats')
    ax.set_ylabel('reward above the base policy')
    ax.legend(frameon=False, fontsize=8)
  figure.suptitle('Gold (marks, law: line) and proxy (dashed, in its standard deviations)')
  figure.savefig(path, dpi=120)


def shown(row: dict, factor: str, plan: dict) -> bool:
  """Whether a panel of this factor has the proxy."""
  if factor == 'width':
    return row['pairs'] == plan['middle']
  return row['width'] == plan['widths'][-2]
