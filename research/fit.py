"""Fits scaling laws to a table of results: `python -m research.fit --results=FILE.csv`."""

import argparse
import sys

EXAMPLES = """
A row needs N (parameters), D (tokens) or C (training FLOPs), and the loss in nats per token.
Columns are found by name (params, n, "Model Size"; tokens, d; flops, c; loss; budget; run; status;
role) or named with the flags below.

  python -m research.fit --results=results.csv
  python -m research.fit --results=points.csv --params='Model Size' --flops='Training FLOP' --drop_highest=5
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
  for name in ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role'):
    add(f'--{name}', metavar='COLUMN', help=f'the column of the {name}')
  for name in ('params', 'tokens', 'flops'):
    add(
      f'--{name}_unit', type=float, default=1.0, metavar='X', help=f'one unit of {name}, e.g. 1e9'
    )
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


def main(argv=None) -> int:
  flags = parser().parse_args(argv)
  from research.errors import UserError

  try:
    return _fit(flags)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2


def _fit(flags) -> int:
  from research import scaling
  from research.scaling import laws

  if flags.law == 'list':
    for law in laws.standard():
      print(f'{law.name:24s} {law.output} = {law.form}   [{", ".join(law.inputs)}]')
    return 0
  names = ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role')
  units = ('params_unit', 'tokens_unit', 'flops_unit', 'loss_unit')
  rows = scaling.read_table(flags.results)
  analysis = scaling.fit_results(
    rows,
    columns=scaling.Columns(**{name: getattr(flags, name) for name in names + units}),
    law=laws.by_name(flags.law),
    fixed=_pairs('--fix', flags.fix, float),
    tied=_pairs('--tie', flags.tie, str),
    profile=flags.profile,
    noise=flags.noise,
    robust=flags.robust,
    delta=flags.delta,
    residuals=flags.residuals,
    drop_highest=flags.drop_highest,
    replicates=flags.bootstrap,
    resample=flags.resample,
    level=flags.level,
    seed=flags.seed,
    role=None if flags.all_rows else 'fit',
  )
  print(analysis)
  forecasts = [analysis.forecast(c) for c in flags.forecast]
  for forecast in forecasts:
    print(f'Forecast: {forecast}')
  if flags.save:
    analysis.save(flags.save)
    print(f'Saved: {flags.save}')
  if flags.report:
    from research.scaling import report

    first = forecasts[0] if forecasts else None
    title = f'Scaling-law fit of {flags.results}'
    print(f'Report: {report.write(flags.report, analysis, title=title, runs=rows, forecast=first)}')
  return 0


def _pairs(flag, items, kind) -> dict:
  from research.errors import UserError

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
