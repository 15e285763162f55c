"""One self-contained HTML page for somebody who has seen neither the code nor the sweep."""

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from research.scaling import plots
from research.scaling.analysis import Analysis, Forecast

STYLE = """
body { font: 16px/1.55 Georgia, 'Times New Roman', serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-family: Helvetica, Arial, sans-serif; line-height: 1.2; } h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font: 13px/1.4 Helvetica, Arial, sans-serif; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption, .small { font-size: .88rem; color: #555; }
.headline { background: #f6f4ef; border-left: 4px solid #c0392b; padding: .7rem 1rem; } .warn { color: #a33; }
details { margin: .8rem 0; } summary { cursor: pointer; font-family: Helvetica, Arial, sans-serif; }
"""  # noqa: E501


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
  """Writes the page and returns its path.

  Args:
    runs: rows of results for the table at the end; curves: run -> [(tokens, loss), ...].
    forecast, outcome: what was forecast before its run, and the loss that the run reached.
    meta: anything that says where this comes from (config, corpus, commit, time).
  """
  a = analysis
  sections = [
    f'<h1>{_text(title)}</h1>',
    _headline(a, forecast, outcome),
    _reading(a),
    _isoflop(a),
    _law(a),
    _allocation(a, forecast),
    _forecast(a, forecast, outcome),
    _doubts(a),
    _conventions(a),
    _curves(a, curves),
    _runs(a, runs),
    _meta(meta),
  ]
  body = '\n'.join(s for s in sections if s)
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
  )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path


def _headline(a: Analysis, forecast, outcome) -> str:
  found = a.exponents()
  which = 'approach 3' if a.approach3 is not None else 'approach 2'
  (na, la, ha), (nb, lb, hb) = found[f'a, {which}'], found[f'b, {which}']
  ratio = a.optimum(a.rows.flops.max())
  text = (
    f'{len(a.rows)} training runs between {a.rows.flops.min():.3g} and {a.rows.flops.max():.3g} '
    f'FLOPs say that the '
    f'compute-optimal model size grows as <b>N* ∝ C<sup>{na:.3f}</sup></b> {_range(la, ha)} and the '
    f'optimal number of '
    f'tokens as <b>D* ∝ C<sup>{nb:.3f}</sup></b> {_range(lb, hb)}. At the largest budget the best split is '
    f'{_sci(ratio.params)} parameters on {_sci(ratio.tokens)} tokens, '
    f'{ratio.tokens / ratio.params:.3g} tokens a parameter.'
  )
  if forecast is not None:
    text += (
      f' Before the run at {forecast.extrapolation:.2g} times the largest budget started, its loss '
      f'was forecast as '
      f'<b>{forecast.loss:.4f}</b> {_range(forecast.loss_low, forecast.loss_high, 4)}'
    )
    text += (
      f'; it came out at <b>{outcome:.4f}</b>, an error of <b>{forecast.error(outcome):+.2%}</b>.'
      if outcome is not None
      else '.'
    )
  return f'<p class="headline">{text}</p>'


def _reading(a: Analysis) -> str:
  return (
    '<p class="small">N is the number of parameters '
    f'(column <code>{_text(a.rows.columns.get("params", "params"))}</code>), D the number of training '
    f'tokens, C the training '
    f'FLOPs ({_text(str(a.cost))}); the loss is the mean negative log-likelihood in nats per token on '
    f'held-out text. '
    f'Brackets are {a.level:.0%} intervals from a bootstrap. An isoFLOP curve is a set of runs that '
    f'spend the same C on '
    'models of different size: too small a model cannot learn more, too large a one sees too few '
    'tokens, and the lowest '
    'point between is the compute-optimal size at that budget.</p>'
  )


def _isoflop(a: Analysis) -> str:
  out = '<h2>IsoFLOP curves</h2>'
  if a.approach2 is None:
    return out + f'<p class="warn">{_text(a.refusals.get("approach 2", "Not fitted."))}</p>'
  out += _image(
    plots.isoflop(a), 'Each colour is one budget; stars are the minima of the fitted profiles.'
  )
  rows = [
    (
      f'{p.flops:.3g}',
      len(p.params),
      _sci(p.params_opt),
      _sci(p.tokens_opt),
      f'{p.loss_opt:.4f}',
      p.refused or '; '.join(p.warnings),
    )
    for p in a.approach2.profiles
  ]
  return out + _table(('C', 'sizes', 'N*', 'D*', 'lowest loss', 'remarks'), rows)


def _law(a: Analysis) -> str:
  out = '<h2>The fitted law</h2>'
  if a.approach3 is None:
    return out + f'<p class="warn">{_text(a.refusals.get("approach 3", "Not fitted."))}</p>'
  fit, spread = a.approach3, a.bootstrap.intervals(a.level)
  out += f'<p>L = {_text(fit.law.form)} <span class="small">({_text(fit.law.source)})</span></p>'
  rows = [
    (name, f'{value:.5g}', _range(*spread[name], 4, bare=True), fit.law.parameters[name].meaning)
    for name, value in fit.parameters.items()
  ]
  out += _table(('parameter', 'value', f'{a.level:.0%} interval', 'meaning'), rows)
  return out + _image(
    plots.surface(a),
    'Contours of equal fitted loss; points are the runs, the line is the cheapest way to each loss.',
  )


def _allocation(a: Analysis, forecast) -> str:
  rows = [
    (name, f'{v:.4f}', _range(low, high, 3, bare=True))
    for name, (v, low, high) in a.exponents().items()
  ]
  return (
    '<h2>How to split a budget</h2>'
    + _image(
      plots.allocation(a, forecast),
      'Optimal parameters and tokens against compute, with the bootstrap band.',
    )
    + _table(('exponent', 'value', f'{a.level:.0%} interval'), rows)
  )


def _forecast(a: Analysis, forecast, outcome) -> str:
  if forecast is None:
    return ''
  rows = [
    ('FLOPs', f'{forecast.flops:.3g}', ''),
    (
      'parameters N',
      _sci(forecast.params),
      _range(forecast.params_low, forecast.params_high, bare=True),
    ),
    (
      'tokens D',
      _sci(forecast.tokens),
      _range(forecast.tokens_low, forecast.tokens_high, bare=True),
    ),
    ('loss', f'{forecast.loss:.4f}', _range(forecast.loss_low, forecast.loss_high, 4, bare=True)),
  ]
  if len(forecast.parts) > 1:
    rows += [(f'loss by {approach}', f'{x:.4f}', '') for approach, x in forecast.parts.items()]
  if outcome is not None:
    rows.append(('outcome', f'{outcome:.4f}', f'error {forecast.error(outcome):+.2%}'))
  return (
    '<h2>Forecast and outcome</h2>'
    + _image(plots.forecast(a, forecast, outcome), f'Forecast by {forecast.method}.')
    + _table(('', 'value', f'{forecast.level:.0%} interval'), rows)
  )


def _doubts(a: Analysis) -> str:
  out = '<h2>How far to believe it</h2>'
  items = [*a.notes, *(f'{name} refused: {why}' for name, why in a.refusals.items())]
  if items:
    out += '<ul>' + ''.join(f'<li class="warn">{_text(item)}</li>' for item in items) + '</ul>'
  else:
    out += '<p>No check raised a doubt: every curve has its minimum inside, and the approaches agree.</p>'
  if a.approach3 is None:
    return out
  fit = a.approach3
  minima = [(f'{m.objective:.8g}', m.kind, m.starts, _values(m.parameters)) for m in fit.minima[:8]]
  out += _table(('objective', 'kind', 'starts that end there', 'parameters'), minima)
  out += (
    f'<p class="small">All distinct minima from {fit.starts} starts are listed. The condition number '
    f'of the curvature is '
    f'{fit.condition:.2g}.</p>'
  )
  out += _image(
    plots.residuals(a), 'Fitted over observed loss: a trend here is something that the law misses.'
  )
  return out + _image(
    plots.bootstrap(a),
    'Each dot is a fit to resampled runs; stretched clouds are parameters that trade off.',
  )


def _conventions(a: Analysis) -> str:
  if not a.conventions:
    return ''
  names = list(dict.fromkeys(k for row in a.conventions for k in row))
  rows = [[_cell(row.get(k, '')) for k in names] for row in a.conventions]
  return (
    '<h2>The same runs under other conventions</h2><p class="small">Which parameters and which FLOPs '
    'are counted '
    'changes the exponents, most of all for small models.</p>' + _table(names, rows)
  )


def _curves(a: Analysis, curves) -> str:
  if not curves:
    return ''
  params = {str(r): float(n) for r, n in zip(a.rows.run, a.rows.params, strict=True)}
  return '<h2>Training curves</h2>' + _image(
    plots.curves(curves, params), 'Loss while training, one line a run.'
  )


def _runs(a: Analysis, runs) -> str:
  out = ''
  if a.rows.excluded:
    out += '<h2>Rows left out</h2>' + _table(('run', 'why'), a.rows.excluded)
  runs = list(runs) if runs is not None else []
  if runs:
    names = list(dict.fromkeys(k for row in runs for k in row))
    body = _table(names, [[_cell(row.get(k, '')) for k in names] for row in runs[:500]])
    out += f'<details><summary>All {len(runs)} rows</summary>{body}</details>'
  return out


def _meta(meta) -> str:
  if not meta:
    return ''
  return '<h2>Where this comes from</h2>' + _table(('', ''), [(k, str(v)) for k, v in meta.items()])


def _image(figure, caption: str) -> str:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  data = base64.b64encode(buffer.getvalue()).decode()
  text = html.escape(caption)
  image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
  return f'<figure>{image}<figcaption>{text}</figcaption></figure>'


def _table(head, rows) -> str:
  cell = lambda v: (
    f'<td class="text">{_text(v)}</td>' if len(str(v)) > 30 else f'<td>{_text(v)}</td>'
  )
  lines = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
  return '<table><tr>' + ''.join(f'<th>{_text(h)}</th>' for h in head) + f'</tr>{lines}</table>'


def _text(value) -> str:
  return html.escape(str(value))


def _cell(value) -> str:
  try:
    number = float(value)
  except (TypeError, ValueError):
    return str(value)
  if not np.isfinite(number) or (number.is_integer() and abs(number) < 1e6):
    return str(value)
  return f'{number:.5g}'


def _values(parameters) -> str:
  return ', '.join(f'{k} {v:.4g}' for k, v in parameters.items())


def _sci(value) -> str:
  value = float(value)
  if not np.isfinite(value):
    return '—'
  for scale, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if scale <= value < 1e15:
      return f'{value / scale:.3g}{letter}'
  return f'{value:.3g}'


def _range(low, high, digits=3, bare=False) -> str:
  if not (np.isfinite(low) and np.isfinite(high)):
    return '' if not bare else '—'
  show = (lambda v: f'{v:.{digits}f}') if 1e-3 <= abs(high) < 1e3 else _sci
  return f'[{show(low)}, {show(high)}]'
