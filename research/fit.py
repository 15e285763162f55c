"""Fits scaling laws to a table of results: `python -m research.fit --results=FILE.csv`."""

import argparse
import sys

from research.core import cli
from research.core.errors import UserError

EXAMPLES = """
A row needs N (parameters), D (tokens) or C (training FLOPs), and the loss in nats per token.
Columns are found by name (params, n, "Model Size"; tokens, "Tokens (B)"; flops, c; loss, eval/loss; budget;
run; status; role) or named with the flags below.

  python -m research.fit --results=results.csv
  python -m research.fit --results=points.csv --params='Model Size' --flops='Training FLOP' --drop_highest=5
  python -m research.fit --results=runs.csv --where=dataset=c4 --where='tokens>=1e9' --forecast=1e21
  python -m research.fit --results=rates.csv --pick=best:loss:params,tokens --tokens_unit=1e9
  python -m research.fit --results=repeats.csv --law=DataConstrained --input unique_tokens=U
"""
SPLIT = ('residual', 'pairs', 'cluster by run', 'cluster by budget')
# Flag -> (default, choices, help).
CHOICES = {
  'loss_unit': (None, ('nats', 'bits', 'perplexity'), 'of the loss, per token (default nats)'),
  'profile': ('parabola', ('parabola', 'cubic', 'akima'), "approach 2's curve"),
  'robust': (None, ('huber', 'l1', 'l2'), "loss on the residuals (default the law's own, mostly huber)"),
  'starts': ('grid', ('grid', 'projected'), 'the whole grid, or linear parameters solved for'),
  'residuals': (None, ('log', 'linear'), "of ln L or of L (default the law's own, mostly log)"),
  'resample': (None, SPLIT, 'what the bootstrap redraws (default: runs with several rows, else residuals)'),
}  # fmt: skip
NUMBERS = {
  'noise': (float, None, 'NATS', 'standard deviation of the loss from seed to seed, if known'),
  'delta': (float, 1e-3, 'X', "Huber's delta (default 1e-3)"),
  'tau': (float, 0.5, 'T', 'asymmetric loss: predictions below the data weigh T, above 1 - T'),
  'drop_highest': (int, 0, 'K', 'leave out the K highest losses'),
  'bootstrap': (int, 1000, 'R', 'replicates (default 1000)'),
  'level': (float, 0.9, 'P', 'of every interval (default 0.9)'),
  'seed': (int, 0, 'N', 'of the bootstrap'),
}
REPEATED = {
  'gin_file': ('FILE', 'FIT = @fitting.fit_results and its bindings, as in gin/fits/'),
  'where': ('CONDITION', 'only rows with COLUMN=VALUE (or !=, <, <=, >, >=, "COLUMN in A,B")'),
  'pick': ('RULE', 'last:run, best:loss:params,tokens, or all (checkpoints of a run too)'),
  'input': ('NAME=COLUMN', 'the column of an input of the law'),
  'fix': ('NAME=VALUE', 'hold a parameter, e.g. --fix=E=1.7'),
  'tie': ('NAME=OTHER', 'tie parameters, e.g. --tie=beta=alpha'),
  'then_pick': ('RULE', 'as --pick, for the rows of the second step'),
  'anchor': ('NAME=X,...', 'a point of the second law that no run measured: loss=0,accuracy=1'),
  'predict': ('NAME=X,...', 'the value of the law at a point, e.g. params=1e9,tokens=2e10'),
}
COLUMNS = ('params', 'tokens', 'flops', 'loss', 'budget', 'run', 'status', 'role')


def parser() -> argparse.ArgumentParser:
  p = cli.parser('fit', 'Fit scaling laws to rows of results.', gin=False)
  p.epilog = EXAMPLES
  add = p.add_argument
  add('--results', metavar='FILE', help='.csv, .tsv, .json, .jsonl or .parquet, compressed or not')
  for name in COLUMNS:
    add(f'--{name}', metavar='COLUMN', help=f'the column of the {name}')
  for name in ('params', 'tokens', 'flops'):
    add(
      f'--{name}_unit', type=float, default=1.0, metavar='X', help=f'one unit of {name}: 1e9, ...'
    )
  add('--law', default='Chinchilla', help='a law by name, module.Class, or list, which shows all')
  add('--rule', default='default', help='what a forecast is made by; --rule=list shows all')
  for name, (default, choices, text) in CHOICES.items():
    add(f'--{name}', default=default, choices=choices, help=text)
  for name, (kind, default, metavar, text) in NUMBERS.items():
    add(f'--{name}', type=kind, default=default, metavar=metavar, help=text)
  for name, (metavar, text) in REPEATED.items():
    add(f'--{name}', action='append', default=[], metavar=metavar, help=text)
  text = 'forecast at this budget'
  add('--forecast', action='append', default=[], type=float, metavar='FLOPS', help=text)
  add('--then', metavar='LAW', help='a second step: what a task measures, from the loss of --law')
  add('--examples', metavar='N', help='examples of an accuracy, or their column: binomial noise')
  add('--figure', metavar='FILE', help='draw the fit: .png, .svg or .pdf')
  add('--all_rows', action='store_true', help="use rows of every role, not only role='fit'")
  add('--strict', action='store_true', help='a doubt about the table is an error')
  add('--save', metavar='FILE.json', help='write the analysis')
  add('--report', metavar='FILE.html', help='write a self-contained report')
  return p


def main(argv=None) -> int:
  flags = cli.parse(parser(), argv)
  try:
    _fit(flags)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _fit(flags) -> None:
  from research.scaling import flags as asked
  from research.scaling import forecasting, selection, stages, tables

  if flags.law == 'list' or flags.rule == 'list':
    print(asked.list_laws() if flags.law == 'list' else forecasting.list_rules())
    return
  if not flags.results:
    raise UserError('--results=FILE is missing: the table to fit.')
  _keep_compiled()
  chosen = asked.options(flags, parser().get_default)
  table = tables.read(flags.results)
  if table.reading:
    print(f'Read: {flags.results}, {table.reading}')
  rows = selection.where(table.rows, flags.where)
  picked = selection.pick(rows, flags.pick)
  analysis = stages.fit(picked, flags, chosen, every=rows)
  print(analysis)
  for point in asked.points(flags.predict):
    print(stages.tell(analysis, point))
  forecasts = [analysis.forecast(budget) for budget in flags.forecast]
  for forecast in forecasts:
    print(f'Forecast: {forecast}')
  _write(flags, analysis, picked, forecasts)


def _keep_compiled() -> None:
  """Compiling is most of a fit's time, and the next fit of the same law has nothing to compile."""
  import jax

  from research.data import cache

  jax.config.update('jax_compilation_cache_dir', str(cache.default_cache() / 'xla'))


def _write(flags, analysis, rows, forecasts) -> None:
  from research import scaling
  from research.scaling import serial

  try:
    if flags.save:
      serial.save(analysis, flags.save)
      print(f'Saved: {flags.save}')
    if flags.figure:
      scaling.plot(analysis).savefig(flags.figure, dpi=150)
      print(f'Figure: {flags.figure}')
    if flags.report:
      from research.scaling.report import sections

      first = forecasts[0] if forecasts else None
      title = f'Scaling-law fit of {flags.results}'
      path = sections.write(flags.report, analysis, title=title, runs=rows, forecast=first)
      print(f'Report: {path}')
  except OSError as error:
    raise UserError(
      f'{error.filename or flags.save} could not be written: {error.strerror}.'
    ) from None


if __name__ == '__main__':
  cli.run(main)
