"""Runs a scaling-law sweep: trains its runs, fits the law, registers a forecast, tests it, and writes a report.

Writes into --workdir: runs/<run>/ (as research.train does), results.csv, fit.json, forecast.json (before the
run that tests it starts), the figures and report.html. Started again, it does only the missing parts.
"""

import dataclasses
import os
import pathlib

from research.core import cli

if __name__ == '__main__':
  _parser = cli.parser('sweep', __doc__)
  _parser.add_argument(
    '--workdir', default=None, metavar='DIR', help='default: runs/<name of the first gin file>'
  )
  _parser.add_argument('--plan', action='store_true', help='print the runs, and stop')
  _parser.add_argument(
    '--measure',
    action='store_true',
    help='with --plan: time steps on this machine, and say how long it takes',
  )
  _parser.add_argument(
    '--compiled',
    default=None,
    metavar='FILE',
    help='with --plan: say how long the sweep takes on the hardware of this JSON file of research.compile',
  )
  _parser.add_argument(
    '--fleet', type=int, default=None, metavar='N',
    help='with --plan and --measure or --compiled: say how long the sweep takes on N such hosts; --address '
    'asks a cluster how many there are',
  )  # fmt: skip
  _parser.add_argument(
    '--preemptions',
    type=float,
    default=0.0,
    metavar='R',
    help='with --fleet: how often each host is preempted, per hour',
  )
  _parser.add_argument('--status', action='store_true', help='print how far the runs are, and stop')
  _parser.add_argument(
    '--worker', action='store_true', help='work as one of the workers, until every run is over'
  )
  _parser.add_argument(
    '--cores', default=None, metavar='I,J', help='the processor cores of a worker'
  )
  _parser.add_argument(
    '--peers',
    type=int,
    default=1,
    metavar='N',
    help='of --worker: how many workers share the runs, this one included',
  )
  _parser.add_argument(
    '--launcher',
    default=None,
    metavar='NAME',
    help='starts the workers: local (the default), slurm or ray; gcloud, gke, xpk and skypilot print the '
    'commands to run; module.Class is a launcher of your own',
  )
  _parser.add_argument(
    '--address', default=None, metavar='HOST:PORT', help='of the head of a Ray cluster'
  )
  FLAGS = cli.parse(_parser)
  if FLAGS.cores:  # before jax is imported: it starts a thread for each core that it may use
    os.sched_setaffinity(0, [int(core) for core in FLAGS.cores.split(',')])
  cli.use_huge_pages()

from research.core import configs, storage
from research.core.errors import UserError
from research.designs.isoflop import IsoFlop
from research.sweeps import findings, report
from research.sweeps.control import get_done, work
from research.sweeps.estimate import show_estimate
from research.sweeps.findings import Refused
from research.sweeps.folder import Folder
from research.sweeps.forecast import register_forecast, show_forecast
from research.sweeps.launchers import by_name
from research.sweeps.status import Table, show_plan, show_status
from research.sweeps.sweep import check_fresh, make_folder, make_plan, open_data


def main(flags) -> int:
  """Runs the sweep; 1 if the law could not be fitted."""
  config = configs.load(flags.gin_file, flags.gin, root='SWEEP')
  sweep = config.build()
  name = pathlib.Path(flags.gin_file[0]).stem
  folder = Folder(storage.place(flags.workdir or pathlib.Path('runs') / name))
  if flags.worker:
    return work(sweep, folder, flags.peers)
  if flags.status:
    show_status(sweep, folder)
    return 0
  if not flags.plan and (flags.fleet is not None or flags.preemptions):
    raise UserError('--fleet and --preemptions go with --plan.')
  # A misspelt name is told before anything is planned or frozen.
  sweep = dataclasses.replace(sweep, launcher=by_name.chosen(flags, sweep.launcher))
  rungs, runs, base = make_plan(sweep)
  show_plan(sweep, runs)
  if flags.plan:
    show_estimate(flags, sweep, runs)
    return 0
  make_folder(folder, config.text)
  folder.register(runs)
  streams = open_data(sweep, runs, base)
  if not sweep.design.repeats:
    check_fresh(runs, streams, base.target_length)

  def law_so_far(runs) -> str:
    isoflop = isinstance(sweep.design, IsoFlop)
    return findings.isoflop_so_far(sweep, folder.rows(runs)) if isoflop else ''

  forecast = None
  table = Table(folder, law=law_so_far)
  try:
    if not get_done(flags, sweep, runs, folder, table):
      return 0
    finding = findings.conclude(folder, sweep, runs)
    if sweep.forecast and not isinstance(finding, Refused):
      forecast = register_forecast(sweep, finding, rungs, base.target_length, folder)
      tests = [run for run in folder.plan() if run.name in forecast['runs']]
      check_fresh(tests, streams, base.target_length)
      get_done(flags, sweep, folder.plan(), folder, table)
  finally:
    table.close()
  path = report.write(folder, sweep, finding, forecast)
  print(finding)
  if forecast:
    show_forecast(folder, forecast)
  print(f'rows: {folder.path / "results.csv"}\nreport: {path}')
  return 1 if isinstance(finding, Refused) else 0


if __name__ == '__main__':
  cli.run(main, FLAGS)
