"""Fits scaling laws to a table of results: `python -m research.fit --results=FILE.csv`."""

import argparse
import dataclasses
import sys

from research.core import cli
from research.core.errors import UserError, did_you_mean

EXAMPLES = """
A row needs N (parameters), D (tokens) or C (training FLOPs), and the loss in nats per token.
Columns are found by name (params, n, "Model Size"; tokens, d; flops, c; loss; budget; run; status;
role) or named with the flags below.

  python -m research.fit --results=results.csv
  python -m research.fit --results=points.csv --params='Model Size' --flops='Training FLOP' --drop_highest=5
  python -m research.fit --results=runs.csv --where=dataset=c4 --where=decay=cosine
  python -m research.fit --results=runs.csv --tokens=d_billions --tokens_unit=1e9 --forecast=1e21
"""


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    prog='python -m research.fit',
    description='Fit scaling laws to rows of results: isoFLOP minima, a parametric law, intervals, forecasts.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = p.add_argument
  add('--results', required=True, metavar='FILE', help='.csv, .jsonl, .json or .parquet')
  add(
    '--gin_file', action='append', default=[], metavar='FILE',
    help='FIT = @analysis.fit_results and its bindings, as in gin/fits/; flags and --gin.X=Y override them',
  )  # fmt: skip
  for name in ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role'):
    add(f'--{name}', metavar='COLUMN', help=f'the column of the {name}')
  for name in ('params', 'tokens', 'flops'):
    add(
      f'--{name}_unit', type=float, default=1.0, metavar='X', help=f'one unit of {name}, e.g. 1e9'
    )
  add(
    '--where', action='append', default=[], metavar='COLUMN=VALUE',
    help='use only the rows with this value, e.g. --where=dataset=c4; all of several must hold',
  )  # fmt: skip
  add('--loss_unit', choices=('nats', 'bits'), help='of the loss, per token (default nats)')
  add(
    '--law',
    default='Chinchilla',
    help='what approach 3 fits (default Chinchilla); --law=list shows all',
  )
  add(
    '--fix',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='hold a parameter, e.g. --fix=E=1.7',
  )
  add(
    '--tie',
    action='append',
    default=[],
    metavar='NAME=OTHER',
    help='tie parameters, e.g. --tie=beta=alpha',
  )
  add(
    '--profile',
    default='parabola',
    choices=('parabola', 'cubic', 'akima'),
    help="approach 2's curve",
  )
  add(
    '--noise',
    type=float,
    metavar='NATS',
    help='seed-to-seed standard deviation of the loss, if known',
  )
  add('--robust', default='huber', choices=('huber', 'l1', 'l2'), help='loss on the residuals')
  add('--delta', type=float, default=1e-3, help="Huber's delta (default 1e-3)")
  add(
    '--tau', type=float, default=0.5, metavar='T',
    help='asymmetric loss: predictions below the data weigh T, above 1 - T (default 0.5)',
  )  # fmt: skip
  add(
    '--starts', default='grid', choices=('grid', 'projected'),
    help="where the law's parameters begin: its whole grid, or linear ones solved for",
  )  # fmt: skip
  add('--residuals', default='log', choices=('log', 'linear'), help='of ln L (default) or of L')
  add('--drop_highest', type=int, default=0, metavar='K', help='leave out the K highest losses')
  add('--bootstrap', type=int, default=1000, metavar='R', help='replicates (default 1000)')
  add(
    '--resample',
    default='residual',
    choices=('residual', 'pairs', 'cluster by run', 'cluster by budget'),
    help='what the bootstrap redraws',
  )
  add('--level', type=float, default=0.9, help='of every interval (default 0.9)')
  add('--seed', type=int, default=0)
  add(
    '--forecast',
    action='append',
    default=[],
    type=float,
    metavar='FLOPS',
    help='forecast at this budget',
  )
  add('--all_rows', action='store_true', help="use rows of every role, not only role='fit'")
  add('--save', metavar='FILE.json', help='write the analysis')
  add('--report', metavar='FILE.html', help='write a self-contained report')
  return p


# Flags that are arguments of `fit_results` under another name or none; the others have its names.
COLUMNS = ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role')
COLUMNS += ('params_unit', 'tokens_unit', 'flops_unit', 'loss_unit')
OPTIONS = {
  'profile': 'profile', 'noise': 'noise', 'robust': 'robust', 'delta': 'delta', 'tau': 'tau',
  'starts': 'starts', 'residuals': 'residuals', 'drop_highest': 'drop_highest',
  'bootstrap': 'replicates', 'resample': 'resample', 'level': 'level', 'seed': 'seed',
}  # fmt: skip


def main(argv=None) -> int:
  flags = cli.parse(parser(), argv)
  try:
    return _fit(flags)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2


def _options(flags) -> dict:
  """The arguments of `fit_results`: those of the gin files, and over them the flags that were given."""
  from research import scaling
  from research.core import configs
  from research.scaling import laws

  options = {}
  if flags.gin_file or flags.gin:
    fit = configs.load(flags.gin_file, flags.gin, root='FIT').tree()
    if getattr(fit, 'func', fit) is not scaling.fit_results:
      raise UserError(f'{flags.gin_file[-1]}: FIT must be @analysis.fit_results.')
    options = dict(getattr(fit, 'keywords', {}))
  default = parser().get_default
  given = lambda names: {n: getattr(flags, n) for n in names if getattr(flags, n) != default(n)}
  options |= {OPTIONS[name]: value for name, value in given(OPTIONS).items()}
  if columns := given(COLUMNS):
    options['columns'] = dataclasses.replace(options.get('columns', scaling.Columns()), **columns)
  if given(['law']):
    options['law'] = laws.by_name(flags.law)
  for flag, name, kind in (('fix', 'fixed', float), ('tie', 'tied', str)):
    if items := getattr(flags, flag):
      options[name] = {**(options.get(name) or {}), **_pairs(f'--{flag}', items, kind)}
  return options | ({'role': None} if flags.all_rows else {})


def _fit(flags) -> int:
  from research import scaling
  from research.scaling import laws

  if flags.law == 'list':
    for law in laws.standard():
      print(f'{law.name:24s} {law.output} = {law.form}   [{", ".join(law.inputs)}]')
    print('Those of [params, tokens] can be fitted here, the others with scaling.fit in Python.')
    return 0
  import jax

  from research.data import cache

  # Compiling is most of a fit's time, and the next fit of the same law has nothing to compile.
  jax.config.update('jax_compilation_cache_dir', str(cache.default_cache() / 'xla'))
  options = _options(flags)
  rows = _where(scaling.read_table(flags.results), _pairs('--where', flags.where, str))
  analysis = scaling.fit_results(rows, **options)
  print(analysis)
  forecasts = [analysis.forecast(c) for c in flags.forecast]
  for forecast in forecasts:
    print(f'Forecast: {forecast}')
  if flags.save:
    scaling.save(analysis, flags.save)
    print(f'Saved: {flags.save}')
  if flags.report:
    from research.scaling.report import sections

    first = forecasts[0] if forecasts else None
    title = f'Scaling-law fit of {flags.results}'
    print(
      f'Report: {sections.write(flags.report, analysis, title=title, runs=rows, forecast=first)}'
    )
  return 0


def _where(rows: list[dict], wanted: dict[str, str]) -> list[dict]:
  """The rows that hold the wanted values; a UserError where a column or a value is unknown."""
  for column, value in wanted.items():
    values = {str(row[column]): None for row in rows if column in row}
    if not values:
      known = {name: None for row in rows for name in row}
      raise UserError(f'--where: there is no column {column!r}.{did_you_mean(column, known)}')
    if value not in values:
      few = ', '.join(list(values)[:12])
      raise UserError(f'--where: no row left has {column}={value}; there are {few}.')
    rows = [row for row in rows if str(row.get(column)) == value]
  return rows


def _pairs(flag, items, kind) -> dict:
  out = {}
  for item in items:
    name, equals, value = item.partition('=')
    try:
      out[name] = kind(value)
    except ValueError:
      equals = ''
    if not equals:
      raise UserError(f'{flag}={item} is not NAME=VALUE.')
  return out


if __name__ == '__main__':
  sys.exit(main())
