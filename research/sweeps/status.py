"""What a person sees of a sweep on a terminal: its plan, its live table, its status."""

import json
import os
import pathlib
import sys
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from research.core import text
from research.core.errors import UserError
from research.designs.plan import Planned
from research.sweeps import findings
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep


def tail(path: pathlib.Path, size: int = 4096) -> list[dict]:
  """The last rows of a metrics file, read from its last `size` bytes."""
  try:
    with path.open('rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - size))
      lines = file.read().decode(errors='replace').split('\n')
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return [row for row in rows if isinstance(row, dict) and 'step' in row]


def state(folder: Folder, run: Planned) -> tuple[str, str, str]:
  """(status, loss, progress or reason) of a planned run, as texts."""
  row = folder.row(run)
  if row:
    loss = f'{row["loss"]:.4f}' if row.get('loss') is not None else ''
    return row['status'], loss, row.get('reason') or text.clock(row.get('seconds', 0.0))
  curve = [r for r in tail(folder.run(run) / 'metrics.jsonl') if 'loss' in r]
  if not curve:
    return ('starting' if folder.run(run).exists() else 'waiting'), '', ''
  last = curve[-1]
  tokens_left = (run.steps - last['step']) * run.tokens / run.steps
  eta = tokens_left / max(last.get('tokens_per_second', 0.0), 1.0)
  progress = f'{last["step"] / run.steps:4.0%}, {text.clock(eta)} left'
  return 'running', f'{last["loss"]:.4f}', progress


class Table:
  """A live table of runs on a terminal. Elsewhere it prints a line whenever a run ends.

  Args:
    law: a function of the runs that says what their results tell so far. On a terminal it is called whenever
      another run is over.
  """

  max_rows = 40  # of the live table; the other runs are only counted

  def __init__(
    self, folder: Folder, stream=sys.stderr, law: Callable[[list[Planned]], str] | None = None
  ):
    self.folder = folder
    self.stream = stream
    self.law = law
    self.over: set[str] = set()  # names of the runs that are over, each printed once
    self.law_text = ''  # the last answer of `law`, and how many runs were over then
    self.runs_of_law = 0
    self.live = None
    if stream.isatty():
      self.live = Live(console=Console(file=stream), refresh_per_second=2)
      self.live.start()

  def __call__(self, runs: list[Planned], last: bool = False) -> None:
    """Shows the state of the runs. `last`: no call follows, so that all of them are shown."""
    for run in runs:
      if run.name not in self.over and self.folder.row(run):
        self.over.add(run.name)
        if self.live is None:
          status, loss, when = state(self.folder, run)
          count = f'[{len(self.over)}/{len(runs)}]'
          self.stream.write(f'{count} {run.name}: {status}, loss {loss or "none"} ({when})\n')
          self.stream.flush()
    if self.live is not None:
      self.live.update(self.rich(runs, last))

  def rich(self, runs: list, last: bool):
    """The table, for rich to draw."""
    table = RichTable('run', 'C', 'N', 'D', 'steps', 'status', 'loss', 'time')
    shown = runs
    if len(runs) > self.max_rows and not last:
      shown = [run for run in runs if run.name not in self.over]
    shown = shown[: self.max_rows]
    for run in shown:
      status, loss, when = state(self.folder, run)
      numbers = map(text.si, (run.flops, run.size.params, run.tokens))
      table.add_row(run.name, *numbers, f'{run.steps:,}', status, loss, when)
    if len(runs) > len(shown):
      table.add_row(f'{len(self.over)} of {len(runs)} are over')
    # The law takes a while, so it is only fitted again when another run is over.
    if self.law is not None and len(self.over) != self.runs_of_law:
      self.runs_of_law = len(self.over)
      self.law_text = self.law(runs)
    captions = ['' if last else time_left(self.folder, runs), self.law_text]
    table.caption = '\n'.join(filter(None, captions))
    return table

  def close(self) -> None:
    """Gives the terminal back."""
    if self.live is not None:
      self.live.stop()
      self.live = None


def show_runs(runs: list, flops: str) -> None:
  """Prints a line for each run, and their FLOPs in total."""
  width = max([20, *(len(run.name) for run in runs)])
  print(
    f'{"run":{width}} {"C":>8} {"N":>8} {"D":>8} {"D/N":>7} {"steps":>7} {"batch":>6} {"rate":>8}'
  )
  for run in runs:
    c, n, d = map(text.si, (run.flops, run.size.params, run.tokens))
    ratio = run.tokens / run.size.params
    notes = f'  {" ".join(run.settings)}' if run.settings else ''
    if run.method:
      notes += f'  from {run.parent}, by {run.method}'
    elif run.parent:
      notes += f'  from step {run.fork:,} of {run.parent}'
    print(
      f'{run.name:{width}} {c:>8} {n:>8} {d:>8} {ratio:7.1f} {run.steps:7,} {run.batch_size:6} '
      f'{run.learning_rate:8.2g}{notes}'
    )
  total = sum(run.cost for run in runs)
  print(f'{len(runs)} runs, {text.si(total, "FLOPs")} by {flops}')


def show_states(folder, runs: list, stream=None) -> dict[str, int]:
  """Prints the state of every run and of the sweep; returns how many runs are in each state."""
  stream = stream or sys.stdout
  counted: dict[str, int] = {}
  width = max([20, *(len(run.name) for run in runs)])
  for run in runs:
    status, loss, when = state(folder, run)
    counted[status] = counted.get(status, 0) + 1
    print(f'{run.name:{width}} {status:9} {loss:>8}  {when}', file=stream)
  print(', '.join(f'{n} {status}' for status, n in counted.items()), file=stream)
  if time := time_left(folder, runs):
    print(time, file=stream)
  return counted


def time_left(folder: Folder, runs: list[Planned]) -> str:
  """The time of training so far and still to come, in proportion to FLOPs; '' while no run is over."""
  trained = [(run, row) for run in runs if (row := folder.row(run)) and row.get('seconds')]
  waiting = [run for run in runs if folder.row(run) is None]
  spent = sum(row['seconds'] for _, row in trained)
  flops = sum(run.cost for run, _ in trained)
  if not (flops and waiting):
    return ''
  seconds_left = sum(run.cost for run in waiting) * spent / flops
  return (
    f'{text.clock(spent)} of training so far, about {text.clock(seconds_left)} to go, '
    'summed over the workers'
  )


def show_plan(sweep: Sweep, runs: list[Planned]) -> None:
  """Prints the runs that a sweep will do."""
  show_runs(runs, sweep.design.flops)
  if sweep.forecast:
    largest = max(sweep.design.budgets) * sweep.forecast
    print(f'then a forecast at {text.si(largest, "FLOPs")} and the run that tests it')


def show_status(sweep: Sweep, folder: Folder) -> None:
  """Prints the state of a sweep, and the law of its rows so far.

  Raises:
    UserError: the folder holds no sweep.
  """
  runs = folder.plan()
  if not runs:
    raise UserError(
      f'{folder.path} holds no sweep (no plan.json): start one, or name its folder with --workdir.'
    )
  show_states(folder, runs)
  if sweep.design.law:
    print(findings.provisional_law(sweep, folder.rows(runs)))
