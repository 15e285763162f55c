"""The sections of a page about an analysis, for a reader who knows neither the code nor the sweep."""

import pathlib
from collections.abc import Iterable, Mapping

from research.core.text import si
from research.scaling import comparison
from research.scaling import rows as table
from research.scaling.analysis import Analysis
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.report import charts, page, plots


def write(
  path,
  analysis: Analysis,
  *,
  title: str = 'Scaling-law fit',
  runs: Iterable[Mapping] | None = None,
  curves: Mapping | None = None,
  forecast: Forecast | None = None,
  outcome: float | None = None,
  meta: Mapping | None = None,
) -> pathlib.Path:
  """Writes a page about an analysis and returns its path.

  Args:
    runs: rows of results for the table at the end.
    curves: the training curve of each run, [(tokens, loss), ...].
    forecast, outcome: the forecast that was made before its run, and the loss that the run reached.
    meta: the provenance by name, such as config, corpus, commit, time.
  """
  params = {str(r): float(n) for r, n in zip(analysis.rows.run, analysis.rows.params, strict=True)}
  sections = [
    *law(analysis, forecast, outcome),
    training_curves(curves, params),
    rows(runs, analysis.rows.excluded),
    facts('Where this comes from', meta),
  ]
  return page.write(path, title, sections)


def law(
  a: Analysis, forecast: Forecast | None = None, outcome: float | None = None, after: str = ''
) -> list[str]:
  """The sections on the fits, the forecast and the doubts. The section `after` comes after the headline."""
  return [
    _headline(a, forecast, outcome),
    _reading(a),
    after,
    _isoflop(a),
    _law(a),
    _allocation(a, forecast),
    _forecast(a, forecast, outcome),
    _doubts(a, forecast),
    _conventions(a),
  ]


def training_curves(curves: Mapping | None, params: Mapping | None = None) -> str:
  """The section with the training curves; `curves`: run -> [(tokens, loss), ...]."""
  if not curves:
    return ''
  figure = charts.curves(curves, params)
  return '<h2>Training curves</h2>' + page.image(
    figure, 'Loss while training, one line a run.', 'curves'
  )


def rows(runs: Iterable[Mapping] | None, excluded: Iterable[tuple[str, str]] = ()) -> str:
  """The section with the rows, which a click opens, and those that no fit used."""
  out = '<h2>Rows left out</h2>' + page.table(('run', 'why'), excluded) if excluded else ''
  if runs := list(runs or ()):
    out += page.details(f'All {len(runs)} rows', page.records(runs))
  return out


def facts(title: str, facts: Mapping | None) -> str:
  """A section with names and their values."""
  return f'<h2>{page.text(title)}</h2>' + page.table(('', ''), facts.items()) if facts else ''


def _headline(a: Analysis, forecast, outcome) -> str:
  """The headline: the fitted exponents, the best split by the rule that forecasts, and the forecast."""
  exponents = a.exponents()
  which = 'approach 3' if a.approach3 is not None else 'approach 2'
  grows = []
  for letter, symbol in (('a', 'N'), ('b', 'D')):
    value, low, high = exponents[f'{letter}, {which}']
    sure = f'(assumed, since {a.assumed})' if a.assumed else page.interval(low, high)
    grows.append(f'<i>{symbol}</i>* ∝ <i>C</i><sup>{value:.3f}</sup></b> {sure}')
  text = (
    f'{len(a.rows)} training runs between {a.rows.flops.min():.3g} and {a.rows.flops.max():.3g} '
    f'FLOPs say that the compute-optimal model size grows as <b>{grows[0]} and the optimal number '
    f'of tokens as <b>{grows[1]} ({which}). {_best_split(a)}'
  )
  if forecast is not None:
    times, end = forecast.distance
    scale = f'{times:.2g} times the {end} budget'
    interval = page.interval(forecast.loss_low, forecast.loss_high, 4)
    loss = f'forecast as <b>{forecast.loss:.4f}</b> {interval}'
    if outcome is None:
      text += f' At {scale} the loss is {loss}.'
    else:
      text += (
        f' Before the run at {scale} started, its loss was {loss}; it came out at <b>{outcome:.4f}</b>, '
        f'an error of <b>{forecast.error(outcome):+.2%}</b>.'
      )
  return f'<p class="headline">{text}</p>'


def _best_split(a: Analysis) -> str:
  """A sentence on the split of the largest budget by the rule in use, or where it has none by the law."""
  largest = float(a.rows.flops.max())
  try:
    best = a.forecast(largest)
  except NoForecast:
    best = a.optimum(largest)
    return (
      f'At the largest budget the fitted law splits best into {si(best.params)} parameters on '
      f'{si(best.tokens)} tokens.'
    )
  return (
    f'At the largest budget the best split is {si(best.params)} parameters '
    f'{page.interval(best.params_low, best.params_high)} on {si(best.tokens)} tokens '
    f'{page.interval(best.tokens_low, best.tokens_high)}, {best.tokens / best.params:.3g} tokens a '
    f'parameter, by the rule that forecasts here ({page.text(best.method)}).'
  )


def _reading(a: Analysis) -> str:
  """How to read the page: N, D, C, the loss, the brackets and the three approaches."""
  return (
    '<p class="small">N is the number of parameters (column '
    f'<code>{page.text(a.rows.columns.get("params", "params"))}</code>), D the number of training '
    f'tokens, C the training FLOPs ({page.text(str(a.cost))}); the loss is the mean negative '
    f'log-likelihood in nats per token on held-out text. Brackets are {a.level:.0%} intervals from '
    'a bootstrap. Too small a model cannot learn more, too large a one sees too few tokens for '
    'its compute; between them lies the compute-optimal size. Approach 1 reads it from the size '
    'whose loss is lowest at each C, approach 2 from curves of equal C (isoFLOP), approach 3 from '
    'a law of N and D fitted to all runs.</p>'
  )


def _isoflop(a: Analysis) -> str:
  """The section on approach 2."""
  out = '<h2>IsoFLOP curves</h2>'
  if a.approach2 is None and not table.budget_groups(a.rows):
    return ''  # the rows are not in budgets, so that nobody expects curves
  if a.approach2 is None:
    return out + f'<p class="warn">{page.text(a.refusals.get("approach 2", "Not fitted."))}</p>'
  out += page.image(
    plots.isoflop(a),
    'Each colour is one budget; stars are the minima of the fitted profiles.',
    'isoflop',
  )
  rows = []
  for p in a.approach2.profiles:
    remarks = p.refused or '; '.join(p.warnings)
    optimum = si(p.params_opt), si(p.tokens_opt), f'{p.loss_opt:.4f}'
    rows.append((f'{p.flops:.3g}', len(p.params), *optimum, remarks))
  return out + page.table(('C', 'sizes', 'N*', 'D*', 'lowest loss', 'remarks'), rows)


def _law(a: Analysis) -> str:
  """The section on approach 3."""
  out = '<h2>The fitted law</h2>'
  if a.approach3 is None:
    return out + f'<p class="warn">{page.text(a.refusals.get("approach 3", "Not fitted."))}</p>'
  fit, spread = a.approach3, a.bootstrap.intervals(a.level)
  source = f'<span class="small">({page.text(fit.law.source)})</span>'
  out += f'<p><i>L</i> = {page.formula(fit.law.form)} {source}</p>'
  if sentence := comparison.sentence(a.compared, dict(fit.problem.fixed)):
    out += f'<p>{page.text(sentence)}</p>'
  rows = []
  for name, value in fit.parameters.items():
    low, high = spread[name]
    meaning = fit.law.parameters[name].meaning
    rows.append((page.GREEK.get(name, name), f'{value:.5g}', f'[{low:.4g}, {high:.4g}]', meaning))
  out += page.table(('parameter', 'value', f'{a.level:.0%} interval', 'meaning'), rows)
  return out + page.image(
    plots.surface(a),
    'Contours of equal fitted loss; points are the runs, the line is the cheapest way to each loss.',
    'surface',
  )


def _allocation(a: Analysis, forecast) -> str:
  """The section on N* and D* against C."""
  rows = [
    (name, f'{v:.4f}', page.interval(low, high, 3, bare=True))
    for name, (v, low, high) in a.exponents().items()
  ]
  return (
    '<h2>How to split a budget</h2>'
    + page.image(
      plots.allocation(a, forecast),
      f'Optimal parameters and tokens against compute, with the {a.level:.0%} band of each approach.',
      'allocation',
    )
    + page.table(('exponent', 'value', f'{a.level:.0%} interval'), rows)
  )


def _forecast(a: Analysis, forecast, outcome) -> str:
  """The section on the forecast and its outcome; '' without a forecast."""
  if forecast is None:
    return ''
  rows = [
    ('FLOPs', f'{forecast.flops:.3g}', ''),
    (
      'parameters N',
      si(forecast.params),
      page.interval(forecast.params_low, forecast.params_high, bare=True),
    ),
    (
      'tokens D',
      si(forecast.tokens),
      page.interval(forecast.tokens_low, forecast.tokens_high, bare=True),
    ),
    (
      'loss',
      f'{forecast.loss:.4f}',
      page.interval(forecast.loss_low, forecast.loss_high, 4, bare=True),
    ),
  ]
  if len(forecast.parts) > 1:
    rows += [(f'loss by {approach}', f'{x:.4f}', '') for approach, x in forecast.parts.items()]
  if outcome is not None:
    rows.append(('outcome', f'{outcome:.4f}', f'error {forecast.error(outcome):+.2%}'))
  return (
    '<h2>Forecast and outcome</h2>'
    + page.image(
      plots.forecast(a, forecast, outcome), f'Forecast by {forecast.method}.', 'forecast'
    )
    + page.table(('', 'value', f'{forecast.level:.0%} interval'), rows)
  )


def _doubts(a: Analysis, forecast) -> str:
  """The section on notes and refusals, with the figures that show how well the law fits."""
  out = '<h2>How far to believe it</h2>'
  items = [*a.notes, *(f'{name} refused: {why}' for name, why in a.refusals.items())]
  if forecast is not None and (parts := forecast.parts):
    low, high = min(parts.values()), max(parts.values())
    if high / low > 1.02:
      items.append(
        f'The approaches forecast losses from {low:.4f} to {high:.4f}: {high / low - 1:.0%} apart.'
      )
  if items:
    out += '<ul>' + ''.join(f'<li class="warn">{page.text(item)}</li>' for item in items) + '</ul>'
  else:
    out += '<p>No check raised a doubt: every curve has its minimum inside, and the approaches agree.</p>'
  if a.approach3 is None:
    return out
  out += _minima(a.approach3)
  out += page.image(
    plots.residuals(a),
    'Fitted over observed loss; the colour is the budget C. A trend here is something that the law misses.',
    'residuals',
  )
  return out + page.image(
    plots.bootstrap(a),
    'Each dot is a fit to resampled runs; stretched clouds are parameters that trade off.',
    'bootstrap',
  )


def _minima(fit) -> str:
  """A table of the distinct minima, and one that a click opens of the ends that did not converge."""
  head = ('objective', 'kind', 'starts that end there', 'parameters')

  def line(minimum) -> tuple:
    parameters = ', '.join(f'{name} {v:.4g}' for name, v in minimum.parameters.items())
    return f'{minimum.objective:.8g}', minimum.kind, minimum.starts, parameters

  converged = [line(m) for m in fit.minima if m.kind != 'unconverged']
  stopped = [line(m) for m in fit.minima if m.kind == 'unconverged']
  out = page.table(head, converged) + (
    f'<p class="small">Every distinct minimum that {fit.starts} starts reached. The condition '
    f'number of the curvature is {fit.condition:.2g}.</p>'
  )
  if stopped:
    out += page.details(
      f'{sum(m.starts for m in fit.minima if m.kind == "unconverged")} starts did not converge',
      page.table(head, stopped),
    )
  return out


def _conventions(a: Analysis) -> str:
  """The section on other counts of N and C; '' where the rows have one of each."""
  if not a.conventions:
    return ''
  return (
    '<h2>The same runs under other conventions</h2><p class="small">Which parameters and which '
    'FLOPs are counted changes the exponents, most of all for small '
    'models.</p>' + page.records(a.conventions)
  )
