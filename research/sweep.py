"""A scaling-law sweep: train its runs, fit the law, register a forecast, run it, report.

Writes into --workdir: runs/<run>/ (as research.train does), results.csv, fit.json, forecast.json (before the
forecast run starts), the plots and report.html. Started again it does only what is missing.
"""

import dataclasses
import os
import pathlib
import sys

from research import cli
from research.errors import Invalid, UserError

if __name__ == '__main__':
  _parser = cli.parser('sweep', __doc__)
  _parser.add_argument(
    '--workdir', default=None, metavar='DIR', help='default: runs/<name of the first gin file>'
  )
  _parser.add_argument('--plan', action='store_true', help='print the runs and stop')
  _parser.add_argument(
    '--measure', action='store_true', help='with --plan: time steps here, and say how long it takes'
  )
  _parser.add_argument(
    '--compiled',
    default=None,
    metavar='FILE',
    help='with --plan: how long it takes by the JSON of research.compile, on the hardware it names',
  )
  _parser.add_argument('--status', action='store_true', help='print how far the runs are and stop')
  _parser.add_argument(
    '--worker', action='store_true', help='do runs that nobody else does, until every run is over'
  )
  _parser.add_argument('--cores', default=None, metavar='I,J', help='processor cores of a worker')
  _parser.add_argument(
    '--peers', type=int, default=1, metavar='N', help='workers that share the runs, this one too'
  )
  _parser.add_argument(
    '--launcher',
    default=None,
    metavar='NAME',
    help='what starts the workers: local (as it is by default) or slurm; or gcloud, xpk, skypilot: '
    'print what to run',
  )
  FLAGS = cli.parse(_parser)
  if FLAGS.cores:  # before jax, which starts as many threads as it may use cores
    os.sched_setaffinity(0, [int(core) for core in FLAGS.cores.split(',')])
  cli.use_huge_pages()

from research import configs, findings, launchers, status, sweep_report
from research.scaling import designs
from research.training import metrics, places
from research.workers import Folder, Worker, populations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep is.

  Attributes:
    run: gin file of the run that every run of the sweep is a variation of; it must take the macros EMBED,
      LAYERS and LEARNING_RATE, and is given what it takes of HEADS, HEAD_DIM and MLP.
    design: which runs.
    forecast: the budget of the run that tests the law, as a multiple of the design's largest; None for none.
    forecast_seeds: that run is done from so many seeds, and their mean is the outcome: with as many workers it
      takes no longer.
    population: so many runs of one shape are trained at once (research/population.py); 1 for each alone.
    retries: a run that failed is tried so many times more; then it is reported as failed, with its reason.
    lease: seconds after which a worker that is not heard of has lost its run.
    patience: seconds without any progress (compiling is none) after which a worker counts as hung.
    launcher: what starts the workers.
    prior, noise: a law and the scatter of ln loss between seeds, on which --plan tries what the design would
      find; None for Chinchilla's, with its optimum at the middle of the design.
    fixed: parameters of the law that are known, such as {'E': 0.8} by earlier sweeps of the same data and
      vocabulary: the irreducible loss is what a small sweep can tell least.
    bindings: more gin bindings for every run, as on a command line.
    question: what the sweep asks, for its report.
  """

  run: str
  design: designs.Design
  forecast: float | None = 3.0
  forecast_seeds: int = 1
  population: int = 8
  retries: int = 2
  lease: float = 60.0
  patience: float = 1800.0
  launcher: launchers.Launcher = dataclasses.field(default_factory=launchers.Local)
  prior: dict | None = None
  noise: float = 0.01
  fixed: dict | None = None
  bindings: tuple[str, ...] = ()
  question: str = 'What is the compute-optimal size of this model?'

  def __post_init__(self):
    if self.forecast is not None and not self.forecast > 1:
      raise Invalid(
        Sweep, 'forecast', f'{self.forecast!r} must be above 1: a multiple of the largest budget.'
      )
    if self.forecast is not None and not isinstance(self.design, designs.IsoFlop):
      name = type(self.design).__name__
      raise Invalid(
        Sweep, 'forecast', f'only an IsoFlop design has a forecast run; set it to None for {name}.'
      )
    if self.fixed:
      from research.scaling import laws

      names = list(laws.Chinchilla.parameters)
      if unknown := sorted(set(self.fixed) - set(names)):
        why = f'Chinchilla has no {unknown[0]!r}; it has {", ".join(names)}.'
        raise Invalid(Sweep, 'fixed', why)
    for field, least in (
      ('forecast_seeds', 1),
      ('population', 1),
      ('retries', 0),
      ('lease', 1),
      ('patience', 1),
    ):
      if not getattr(self, field) >= least:
        raise Invalid(Sweep, field, f'{getattr(self, field)!r} must be at least {least}.')

  def config(self, planned: designs.Planned) -> configs.Config:
    return configs.load(self.run, [*self.bindings, *planned.bindings()])


def make_plan(sweep: Sweep) -> tuple[list[designs.Size], list[designs.Planned], configs.Config]:
  """The ladder counted, the runs of the fit, and the base run; everything checked before any compute."""
  base = configs.load(sweep.run, sweep.bindings)
  run = base.build()
  taken = {name for name, macro in base.macros.items() if macro.used}
  for name in ('EMBED', 'LAYERS'):
    if name not in taken:
      raise UserError(
        f'{sweep.run}: nothing in it takes the macro {name}, and a ladder makes sizes by EMBED and LAYERS; '
        f'write %{name} where its model is made.'
      )
  from research.model import counts

  def count(macros: dict) -> counts.Counts:
    sizes = [f'{k}={v}' for k, v in macros.items() if k in taken]
    config = configs.load(sweep.run, [*sweep.bindings, *sizes])
    sized = config.build()
    with config.explains():
      return counts.count(sized.model, sized.train.lengths)

  rungs = [
    dataclasses.replace(size, macros={k: v for k, v in size.macros.items() if k in taken})
    for size in sweep.design.rungs(count)
  ]
  runs = sweep.design.plan(rungs, run.target_length)
  # Runs that differ in their numbers alone are right or wrong together.
  for planned in {(r.size.name, r.batch_size, r.steps, r.settings): r for r in runs}.values():
    sweep.config(planned).build()
  return rungs, runs, run


def check_data(run, frozen, tokens: int, what: str) -> None:
  """More tokens than the stream has would repeat them, and the law is of fresh ones."""
  have = len(frozen) * run.target_length
  if tokens > have:
    raise UserError(
      f'{what} needs {metrics.si(tokens)} tokens and the training stream has {metrics.si(have)}: raise '
      f'train/Stream.examples to {-(-tokens // run.target_length)}, or use a larger corpus.'
    )


def get_done(flags, sweep: Sweep, runs: list[designs.Planned], folder: Folder, table) -> bool:
  """Every run over, by whatever starts the workers; False where that is left to the user."""
  launcher = launchers.named(flags.launcher) if flags.launcher else sweep.launcher
  waiting = lambda: [run for run in runs if folder.row(run) is None]
  todo = lambda: len(waiting())
  arguments = [f'--gin_file={file}' for file in flags.gin_file] + [f'--gin.{b}' for b in flags.gin]
  job = launchers.Job(
    arguments=(*arguments, f'--workdir={folder.path}', '--worker'),
    workdir=folder.path,
    todo=todo,
    at_once=lambda: len(populations(sweep, waiting())),
    watch=lambda: table(runs),
    hung=lambda: hung(sweep, runs, folder),
  )
  if todo() and not launcher.run(job):
    return False
  table(runs, last=True)
  return True


def hung(sweep: Sweep, runs: list[designs.Planned], folder: Folder) -> set[int]:
  """Processes of this machine whose lease has run out while they have it."""
  from research import leases

  store = leases.Leases(folder.path / 'runs', sweep.lease)
  waiting = [run for run in runs if folder.row(run) is None and folder.run(run).exists()]
  found = [entry for run in waiting if (entry := store.read(run.name))]
  return {e.pid for e in found if e.owner and e.expired and e.host == store.host}


def main(flags) -> int:
  config = configs.load(flags.gin_file, flags.gin, root='SWEEP')
  sweep = config.build()
  name = pathlib.Path(flags.gin_file[0]).stem
  folder = Folder(places.place(flags.workdir or pathlib.Path('runs') / name))
  if flags.worker:
    return work(sweep, folder, flags.peers)
  if flags.status:
    return show_status(sweep, folder)
  rungs, runs, base = make_plan(sweep)
  show_plan(sweep, runs)
  if flags.plan:
    foresee(flags, sweep, runs)
    return 0
  make_folder(folder, config.text)
  folder.register(runs)
  frozen = open_data(sweep, runs, base)
  if not sweep.design.repeats:
    check_data(base, frozen, max(run.tokens for run in runs), 'the longest run of this sweep')
  isoflop = isinstance(sweep.design, designs.IsoFlop)
  law = lambda runs: findings.isoflop_so_far(sweep, folder.rows(runs)) if isoflop else ''
  table = status.Table(folder, law=law)
  try:
    if not get_done(flags, sweep, runs, folder, table):
      return 0
    found, forecast = findings.conclude(folder, sweep, runs), None
    if sweep.forecast and not isinstance(found, str):
      forecast = findings.register_forecast(sweep, found, rungs, base.target_length, folder)
      test = next(run for run in folder.plan() if run.name in forecast['runs'])
      check_data(base, frozen, test.tokens, 'the forecast run')
      get_done(flags, sweep, folder.plan(), folder, table)
  finally:
    table.close()
  path = sweep_report.write(folder, sweep, found, forecast)
  refused = isinstance(found, str)
  print(f'no law: {found}' if refused else found)
  if forecast:
    findings.show_forecast(folder, forecast)
  print(f'rows: {folder.path / "results.csv"}\nreport: {path}')
  return 1 if refused else 0


def work(sweep: Sweep, folder: Folder, peers: int) -> int:
  """A worker's process."""
  from research import train

  worker, runs = Worker(sweep, folder, peers), folder.plan()
  worker.share_cores(runs)
  (folder.path / 'workers').mkdir(exist_ok=True)
  (folder.path / 'workers' / str(os.getpid())).touch()  # it got this far
  try:
    worker.work(runs)
  except train.Interrupted as stop:
    print(stop, file=sys.stderr)
    return 143
  return 0


def open_data(sweep: Sweep, runs: list[designs.Planned], base):
  """The base run's training stream; every stream of the sweep is frozen here, once, and not by its workers."""
  from research import data

  say = lambda text: print(text, file=sys.stderr, flush=True)
  streams = {repr(stream): stream for stream in (base.train, base.validation)}
  for settings in dict.fromkeys(run.settings for run in runs):
    run = configs.load(sweep.run, [*sweep.bindings, *settings]).build()
    streams |= {repr(stream): stream for stream in (run.train, run.validation)}
  return data.open_streams(list(streams.values()), log=say)[0]


def show_plan(sweep: Sweep, runs: list[designs.Planned]) -> None:
  status.show_plan(runs, sweep.design.flops)
  if sweep.forecast:
    largest = max(sweep.design.budgets) * sweep.forecast
    print(f'then a forecast at {metrics.si(largest)} FLOPs and the run that tests it')


def foresee(flags, sweep: Sweep, runs: list[designs.Planned]) -> None:
  """What --plan says beside the runs: how long they take, what they would tell."""
  from research import estimate

  speed = None
  if flags.measure:
    speed = estimate.measured(sweep, runs)
  elif flags.compiled:
    speed = estimate.compiled(flags.compiled)
  if speed:
    seconds = sum(map(speed.seconds, runs))
    hours = seconds * speed.chips / 3600
    print(f'at {speed}: {metrics.clock(seconds)} of training one by one, {hours:.3g} chip-hours')
  if sweep.design.law:
    print(estimate.informative(runs, sweep.design.flops, sweep.prior, sweep.noise))


def show_status(sweep: Sweep, folder: Folder) -> int:
  runs = folder.plan()
  if not runs:
    raise UserError(f'{folder.path} holds no sweep: no plan.json; start it, or give its --workdir.')
  status.show_status(folder, runs)
  if sweep.design.law:
    print(findings.provisional_law(sweep, folder.rows(runs)))
  return 0


def make_folder(folder: Folder, text: str) -> None:
  places.make(folder.path)
  metrics.write_atomic(folder.path / 'sweep.gin', text)


if __name__ == '__main__':
  cli.run(main, FLAGS)
