"""A scaling-law sweep: train its runs, fit the law, register a forecast, run it, report.

Writes into --workdir: runs/<run>/ (as research.train does), results.csv, fit.json, forecast.json (before the
forecast run starts), the plots and report.html. Started again it does only what is missing.
"""

import collections
import csv
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import time

from research import cli
from research.errors import Invalid, UserError

if __name__ == '__main__':
  _parser = cli.parser('sweep', __doc__)
  _parser.add_argument(
    '--workdir', default=None, metavar='DIR', help='default: runs/<name of the first gin file>'
  )
  _parser.add_argument('--plan', action='store_true', help='print the runs and stop')
  _parser.add_argument(
    '--worker', action='store_true', help='do runs that nobody else does, then stop'
  )
  _parser.add_argument('--cores', default=None, metavar='I,J', help='processor cores of a worker')
  FLAGS = cli.parse(_parser)
  if FLAGS.cores:  # before jax, which starts as many threads as it may use cores
    os.sched_setaffinity(0, [int(core) for core in FLAGS.cores.split(',')])
  cli.use_huge_pages()

from research import configs
from research.scaling import designs
from research.training import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep is.

  Attributes:
    run: gin file of the run that every run of the sweep is a variation of; it must take the macros EMBED,
      LAYERS, HEADS, HEAD_DIM, MLP and LEARNING_RATE.
    design: which runs.
    forecast: the budget of the run that tests the law, as a multiple of the design's largest; None for none.
    workers: runs at a time on this machine, the cores divided between them; None for one a core.
    bindings: more gin bindings for every run, as on a command line.
    question: what the sweep asks, for its report.
  """

  run: str
  design: designs.IsoFlop
  forecast: float | None = 3.0
  workers: int | None = None
  bindings: tuple[str, ...] = ()
  question: str = 'What is the compute-optimal size of this model?'

  def __post_init__(self):
    if self.forecast is not None and not self.forecast > 1:
      raise Invalid(
        Sweep, 'forecast', f'{self.forecast!r} must be above 1: a multiple of the largest budget.'
      )
    if self.workers is not None and self.workers < 1:
      raise Invalid(Sweep, 'workers', f'{self.workers!r} must be positive.')

  def config(self, planned: designs.Planned) -> configs.Config:
    bindings = [f'{k}={v!r}' for k, v in planned.bindings().items()]
    return configs.load(self.run, [*self.bindings, *bindings])


class Folder:
  """The state of a sweep: its run directories. Any number of workers, started anyhow, may share it."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def run(self, planned: designs.Planned) -> pathlib.Path:
    return self.path / 'runs' / planned.name

  def row(self, planned: designs.Planned) -> dict | None:
    """The finished (or failed) run's row with what the sweep knows of it; None while there is none."""
    path = self.run(planned) / 'run.json'
    if not path.exists():
      return None
    row = json.loads(path.read_text())
    return {'run': planned.name, 'role': planned.role, 'budget': planned.budget, **row}

  def plan(self) -> list[designs.Planned]:
    """The runs that this sweep was started with, the forecast's among them once it is registered."""
    path = self.path / 'plan.json'
    if not path.exists():
      return []
    runs = json.loads(path.read_text())
    return [designs.Planned(**run | {'size': designs.Size(**run['size'])}) for run in runs]

  def register(self, runs: list[designs.Planned]) -> None:
    """Adds runs to the plan.

    Raises:
      UserError: a run of that name is there with other settings.
    """
    old = {run.name: run for run in self.plan()}
    for run in runs:
      if run != old.setdefault(run.name, run):
        raise UserError(
          f'{self.path} holds a sweep in which {run.name} is another run; choose another --workdir.'
        )
    plan = json.dumps([dataclasses.asdict(run) for run in old.values()], indent=1)
    metrics.write_atomic(self.path / 'plan.json', plan)

  def rows(self, runs: list[designs.Planned]) -> list[dict]:
    return [row for row in map(self.row, runs) if row]

  def curve(self, planned: designs.Planned) -> list[dict]:
    return metrics.read_rows(self.run(planned) / 'metrics.jsonl')


# One run, by a worker.


def do_run(sweep: Sweep, planned: designs.Planned, folder: Folder) -> bool:
  """Does a run unless it is done or another process is at it; True when it did something.

  The lock is the kernel's: it is gone with the process that held it, however that died.
  """
  workdir = folder.run(planned)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    if (workdir / 'run.json').exists():
      return False
    lock.write(str(os.getpid()))
    lock.flush()
    from research import train  # jax: only in the process that trains

    with (workdir / 'log.txt').open('a') as log:
      config = sweep.config(planned)
      try:
        with config.explains():
          train.train(config.build(), workdir, config.text, stream=log)
      except train.Interrupted:
        raise
      except Exception as error:
        log.write(f'{type(error).__name__}: {error}\n')
        failed = {
          'status': 'failed',
          'reason': f'{type(error).__name__}: {str(error).splitlines()[0]}',
        }
        metrics.write_atomic(workdir / 'run.json', json.dumps(failed))
    return True


def work(sweep: Sweep, runs: list[designs.Planned], folder: Folder) -> None:
  """A worker: the runs that nobody has, the most expensive first, so that the last ones are short."""
  import jax

  for planned in sorted(runs, key=lambda run: -run.flops):
    if do_run(sweep, planned, folder):
      jax.clear_caches()


# Many runs, by local workers.


def start_worker(flags, workdir: pathlib.Path, cores: list[int]) -> subprocess.Popen:
  command = [sys.executable, '-m', 'research.sweep', '--worker', f'--workdir={workdir}']
  command += [f'--gin_file={file}' for file in flags.gin_file] + [f'--gin.{b}' for b in flags.gin]
  root = str(configs.ROOT)
  env = (
    os.environ
    | cli.CPU_ENVIRONMENT
    | {'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')])}
  )
  if hasattr(os, 'sched_setaffinity'):  # so that workers do not disturb each other
    command.append(f'--cores={",".join(map(str, cores))}')
  with (workdir / 'workers.log').open('a') as log:
    return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def launch(flags, sweep: Sweep, runs: list[designs.Planned], folder: Folder, table) -> None:
  """Local workers until every run has a row. A worker that dies is started again, a few times."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]
  todo = [run for run in runs if folder.row(run) is None]
  n = min(sweep.workers or len(cores), len(todo))
  shares = [cores[i::n] or cores for i in range(n)]
  workers = {i: start_worker(flags, folder.path, share) for i, share in enumerate(shares)}
  deaths = collections.Counter()
  try:
    while workers:
      time.sleep(0.5)
      table(runs)
      for i, worker in list(workers.items()):
        if worker.poll() is None:
          continue
        del workers[i]
        if worker.returncode != 0:
          deaths[i] += 1
          if deaths[i] > 3:
            raise UserError(f'worker {i} died {deaths[i]} times; see {folder.path}/workers.log')
          workers[i] = start_worker(flags, folder.path, shares[i])
  finally:
    for worker in workers.values():
      worker.terminate()
    for worker in workers.values():
      worker.wait()
  table(runs, last=True)


class Table:
  """The live table of runs on a terminal; elsewhere a line whenever a run ends."""

  def __init__(self, folder: Folder, stream=sys.stderr):
    self.folder, self.stream = folder, stream
    self.said: set[str] = set()
    self.live = None
    if stream.isatty():
      from rich.console import Console
      from rich.live import Live

      self.live = Live(console=Console(file=stream), refresh_per_second=2)
      self.live.start()

  def state(self, run: designs.Planned) -> tuple[str, str, str]:
    """(what it is doing, loss, how far)"""
    row = self.folder.row(run)
    if row:
      loss = f'{row["loss"]:.4f}' if row.get('loss') is not None else ''
      return row['status'], loss, row.get('reason') or metrics.clock(row['seconds'])
    curve = [r for r in _tail(self.folder.run(run) / 'metrics.jsonl') if 'loss' in r]
    if not curve:
      return ('starting' if self.folder.run(run).exists() else 'waiting'), '', ''
    last = curve[-1]
    left = (run.steps - last['step']) * run.batch_size * run.tokens / (run.steps * run.batch_size)
    eta = left / max(last.get('tokens_per_second', 0.0), 1.0)
    return (
      'running',
      f'{last["loss"]:.4f}',
      f'{last["step"] / run.steps:4.0%}, {metrics.clock(eta)} left',
    )

  def __call__(self, runs: list[designs.Planned], last: bool = False) -> None:
    states = {run.name: self.state(run) for run in runs}
    if self.live is not None:
      from rich.table import Table as RichTable

      table = RichTable('run', 'C', 'N', 'D', 'steps', 'status', 'loss', 'time')
      for run in runs:
        status, loss, when = states[run.name]
        numbers = map(metrics.si, (run.budget, run.size.params, run.tokens))
        table.add_row(run.name, *numbers, f'{run.steps:,}', status, loss, when)
      self.live.update(table)
    else:
      for run in runs:
        status, loss, when = states[run.name]
        if status not in ('waiting', 'starting', 'running') and run.name not in self.said:
          self.said.add(run.name)
          done = sum(s[0] not in ('waiting', 'starting', 'running') for s in states.values())
          self.stream.write(
            f'[{done}/{len(runs)}] {run.name}: {status}, loss {loss or "none"} ({when})\n'
          )
          self.stream.flush()

  def close(self) -> None:
    if self.live is not None:
      self.live.stop()
      self.live = None


def _tail(path: pathlib.Path, size: int = 4096) -> list[dict]:
  """The last rows of a metrics file, without reading all of it."""
  if not path.exists():
    return []
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - size))
    lines = file.read().decode(errors='replace').split('\n')
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return [row for row in rows if isinstance(row, dict) and 'step' in row]


# From runs to a law, and from the law to the run that tests it.


def make_plan(sweep: Sweep) -> tuple[list[designs.Size], list[designs.Planned], configs.Config]:
  """The ladder counted, the runs of the fit, and the base run; everything checked before any compute."""
  base = configs.load(sweep.run, sweep.bindings)
  run = base.build()
  from research.model import counts

  def count(macros: dict) -> counts.Counts:
    config = configs.load(sweep.run, [*sweep.bindings, *(f'{k}={v}' for k, v in macros.items())])
    sized = config.build()
    with config.explains():
      return counts.count(sized.model, sized.train.lengths)

  rungs = sweep.design.rungs(count)
  runs = sweep.design.plan(rungs, run.target_length)
  for planned in runs:
    sweep.config(planned).build()
  return rungs, runs, run


def show_plan(sweep: Sweep, runs: list[designs.Planned]) -> None:
  print(f'{"run":32} {"C":>8} {"N":>8} {"D":>8} {"D/N":>7} {"steps":>7} {"batch":>6} {"rate":>8}')
  for run in runs:
    c, n, d = map(metrics.si, (run.flops, run.size.params, run.tokens))
    ratio = run.tokens / run.size.params
    print(
      f'{run.name:32} {c:>8} {n:>8} {d:>8} {ratio:7.1f} {run.steps:7,} {run.batch_size:6} '
      f'{run.learning_rate:8.2g}'
    )
  total = sum(run.flops for run in runs)
  print(f'{len(runs)} runs, {metrics.si(total)} FLOPs by {sweep.design.flops}', end='')
  if sweep.forecast:
    largest = max(sweep.design.budgets) * sweep.forecast
    print(f', then a forecast at {metrics.si(largest)} FLOPs and the run that tests it', end='')
  print()


def write_results(path: pathlib.Path, rows: list[dict]) -> None:
  columns = list(dict.fromkeys(key for row in rows for key in row))
  temporary = path.with_name(f'.{path.name}')
  with temporary.open('w', newline='') as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
  temporary.replace(path)


def check_data(run, frozen, tokens: int, what: str) -> None:
  """More tokens than the stream has would repeat them, and the law is of fresh ones."""
  have = len(frozen) * run.target_length
  if tokens > have:
    raise UserError(
      f'{what} needs {metrics.si(tokens)} tokens and the training stream has {metrics.si(have)}: raise '
      f'train/Stream.examples to {-(-tokens // run.target_length)}, or use a larger corpus.'
    )


def register_forecast(sweep: Sweep, analysis, rungs, length: int, folder: Folder) -> dict:
  """The forecast, written once: a law may not be refitted to an outcome that is known.

  The run is the rung nearest to the law's optimum; the forecast is of that very run.
  """
  path = folder.path / 'forecast.json'
  if path.exists():
    return json.loads(path.read_text())
  budget = max(sweep.design.budgets) * sweep.forecast
  best = analysis.forecast(budget)
  planned = sweep.design.run(budget, designs.nearest(rungs, best.params), length, 'forecast')
  if planned.size in (rungs[0], rungs[-1]):
    raise UserError(
      f'the law puts the optimum of {budget:.3g} FLOPs at {metrics.si(best.params)} parameters, the end of the '
      f'ladder ({planned.size.name}): widen Ladder.widths and start again, nothing finished is lost.'
    )
  expected = analysis.forecast(planned.flops, params=planned.size.params, tokens=planned.tokens)
  forecast = {
    'registered': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'run': planned.name,
    'optimal_params': best.params,
    'optimal_tokens': best.tokens,
    'forecast': dataclasses.asdict(expected),
  }
  folder.register([planned])
  metrics.write_atomic(path, json.dumps(forecast, indent=1) + '\n')
  return forecast


def fit(folder: Folder, sweep: Sweep, runs: list[designs.Planned]):
  """results.csv, fit.json and the law."""
  from research.scaling import Columns, fit_results

  rows = folder.rows(runs)
  write_results(folder.path / 'results.csv', rows)
  flops = sweep.design.flops
  columns = Columns(params=designs.CONVENTIONS[flops], tokens='tokens', flops=flops, loss='loss')
  analysis = fit_results(rows, columns=columns)
  metrics.write_atomic(folder.path / 'fit.json', analysis.to_json())
  return rows, analysis


def report(
  folder: Folder, sweep: Sweep, rows: list[dict], analysis, forecast: dict | None, runs
) -> pathlib.Path:
  from research.scaling import Forecast, plots, report

  curve = lambda run: [(r['tokens'], r['loss']) for r in folder.curve(run) if 'loss' in r]
  curves = {run.name: points for run in runs if (points := curve(run))}
  figures = {name: getattr(plots, name)(analysis) for name in ('isoflop', 'surface', 'allocation')}
  expected = outcome = None
  meta = {
    'sweep': 'sweep.gin beside this page; python -m research.sweep --gin_file=sweep.gin does it again',
    'runs': len(rows),
    'process-seconds of training': round(sum(row.get('seconds', 0.0) for row in rows)),
    'FLOP convention': sweep.design.flops,
  }
  if forecast:
    expected = Forecast(**forecast['forecast'])
    row = next(row for row in rows if row['run'] == forecast['run'])
    outcome = row['loss'] if row['status'] == 'finished' else None
    figures['forecast'] = plots.forecast(analysis, expected, outcome)
    meta['forecast registered'] = forecast['registered']
  for name, figure in figures.items():
    figure.savefig(folder.path / f'{name}.png', dpi=150)
  path = folder.path / 'report.html'
  report.write(
    path,
    analysis,
    title=sweep.question,
    runs=rows,
    curves=curves,
    forecast=expected,
    outcome=outcome,
    meta=meta,
  )
  return path


def main(flags) -> int:
  config = configs.load(flags.gin_file, flags.gin, root='SWEEP')
  sweep = config.build()
  name = pathlib.Path(flags.gin_file[0]).stem
  folder = Folder(pathlib.Path(flags.workdir) if flags.workdir else pathlib.Path('runs') / name)
  if flags.worker:
    work(sweep, folder.plan(), folder)
    return 0
  rungs, runs, base = make_plan(sweep)
  show_plan(sweep, runs)
  if flags.plan:
    return 0
  make_folder(folder, config.text)
  folder.register(runs)
  from research import data

  say = lambda text: print(text, file=sys.stderr, flush=True)
  frozen, _ = data.open_streams([base.train, base.validation], log=say)
  check_data(base, frozen, max(run.tokens for run in runs), 'the longest run of this sweep')
  table = Table(folder)
  try:
    launch(flags, sweep, runs, folder, table)
    rows, analysis = fit(folder, sweep, runs)
    forecast = None
    if sweep.forecast:
      forecast = register_forecast(sweep, analysis, rungs, base.target_length, folder)
      runs = folder.plan()
      planned = next(run for run in runs if run.name == forecast['run'])
      check_data(base, frozen, planned.tokens, 'the forecast run')
      launch(flags, sweep, runs, folder, table)
      rows, analysis = fit(folder, sweep, runs)
  finally:
    table.close()
  path = report(folder, sweep, rows, analysis, forecast, runs)
  print(analysis)
  if forecast:
    show_forecast(forecast, folder.row(planned))
  print(f'report: {path}')
  return 0


def show_forecast(forecast: dict, row: dict) -> None:
  expected = forecast['forecast']
  print(
    f'forecast, registered {forecast["registered"]}: {forecast["run"]} will have a loss of '
    f'{expected["loss"]:.4f} [{expected["loss_low"]:.4f}, {expected["loss_high"]:.4f}] ({expected["method"]})'
  )
  if row['status'] != 'finished':
    print(f'outcome: none, the run ended as {row["status"]}')
    return
  error = expected['loss'] / row['loss'] - 1
  print(f'outcome: {row["loss"]:.4f}; the forecast is off by {error:+.2%}')


def make_folder(folder: Folder, text: str) -> None:
  try:
    folder.path.mkdir(parents=True, exist_ok=True)
    metrics.write_atomic(folder.path / 'sweep.gin', text)
  except OSError as error:
    raise UserError(
      f'--workdir={folder.path} cannot be written ({error.strerror}); choose another.'
    ) from None


if __name__ == '__main__':
  cli.run(main, FLAGS)
