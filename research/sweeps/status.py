"""What a person sees of a sweep: its plan, its live table, its status."""

import json
import os
import pathlib
import sys
from collections.abc import Callable

from research.core import text
from research.core.errors import UserError
from research.core.text import si
from research.designs import plan
from research.sweeps import findings
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep


def tail(path: pathlib.Path, size: int = 4096) -> list[dict]:
  """The last rows of a metrics file, without reading all of it."""
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


def state(folder, run) -> tuple[str, str, str]:
  """(what it is doing, loss, how far or why) of a planned run."""
  row = folder.row(run)
  if row:
    loss = f'{row["loss"]:.4f}' if row.get('loss') is not None else ''
    return row['status'], loss, row.get('reason') or text.clock(row.get('seconds', 0.0))
  curve = [r for r in tail(folder.run(run) / 'metrics.jsonl') if 'loss' in r]
  if not curve:
    return ('starting' if folder.run(run).exists() else 'waiting'), '', ''
  last = curve[-1]
  left = (run.steps - last['step']) * run.tokens / run.steps
  eta = left / max(last.get('tokens_per_second', 0.0), 1.0)
  return (
    'running',
    f'{last["loss"]:.4f}',
    f'{last["step"] / run.steps:4.0%}, {text.clock(eta)} left',
  )


class Table:
  """The live table of runs on a terminal; elsewhere a line whenever a run ends."""

  most = 40  # rows of the live table; the rest is counted

  def __init__(self, folder, stream=sys.stderr, law: Callable[[list], str] = lambda runs: ''):
    """`law` says what the runs so far would; it is asked on a terminal whenever another is over."""
    self.folder, self.stream, self.law = folder, stream, law
    self.said: set[str] = set()
    self.asked, self.answer = 0, ''
    self.live = None
    if stream.isatty():
      from rich.console import Console
      from rich.live import Live

      self.live = Live(console=Console(file=stream), refresh_per_second=2)
      self.live.start()

  def __call__(self, runs: list, last: bool = False) -> None:
    for run in runs:
      if run.name not in self.said and self.folder.row(run):
        self.said.add(run.name)
        if self.live is None:
          status, loss, when = state(self.folder, run)
          done = f'[{len(self.said)}/{len(runs)}] {run.name}: {status}'
          self.stream.write(f'{done}, loss {loss or "none"} ({when})\n')
          self.stream.flush()
    if self.live is not None:
      self.live.update(self.rich(runs, last))

  def rich(self, runs: list, last: bool):
    from rich.table import Table as RichTable

    table = RichTable('run', 'C', 'N', 'D', 'steps', 'status', 'loss', 'time')
    # A long sweep shows what is not over yet.
    shown = runs if last or len(runs) <= self.most else [r for r in runs if r.name not in self.said]
    for run in shown[: self.most]:
      status, loss, when = state(self.folder, run)
      numbers = map(text.si, (run.flops, run.size.params, run.tokens))
      table.add_row(run.name, *numbers, f'{run.steps:,}', status, loss, when)
    if len(runs) > len(shown[: self.most]):
      table.add_row(f'{len(self.said)} of {len(runs)} are over')
    if len(self.said) != self.asked:
      self.asked, self.answer = len(self.said), self.law(runs)
    table.caption = '\n'.join(filter(None, ['' if last else to_go(self.folder, runs), self.answer]))
    return table

  def close(self) -> None:
    if self.live is not None:
      self.live.stop()
      self.live = None


def show_runs(runs: list, flops: str) -> None:
  """Prints the runs, one a line, and what they sum up to."""
  width = max([20, *(len(run.name) for run in runs)])
  print(
    f'{"run":{width}} {"C":>8} {"N":>8} {"D":>8} {"D/N":>7} {"steps":>7} {"batch":>6} {"rate":>8}'
  )
  for run in runs:
    c, n, d = map(text.si, (run.flops, run.size.params, run.tokens))
    ratio = run.tokens / run.size.params
    more = f'  {" ".join(run.settings)}' if run.settings else ''
    more += f'  from step {run.fork:,} of {run.parent}' if run.parent else ''
    print(
      f'{run.name:{width}} {c:>8} {n:>8} {d:>8} {ratio:7.1f} {run.steps:7,} {run.batch_size:6} '
      f'{run.learning_rate:8.2g}{more}'
    )
  total = sum(run.cost for run in runs)
  print(f'{len(runs)} runs, {text.si(total, "FLOPs")} by {flops}')


def show_states(folder, runs: list, stream=None) -> dict[str, int]:
  """Prints every run's state and the sweep's; returns how many runs are in each state."""
  stream = stream or sys.stdout
  counted: dict[str, int] = {}
  width = max([20, *(len(run.name) for run in runs)])
  for run in runs:
    status, loss, when = state(folder, run)
    counted[status] = counted.get(status, 0) + 1
    print(f'{run.name:{width}} {status:9} {loss:>8}  {when}', file=stream)
  print(', '.join(f'{n} {status}' for status, n in counted.items()), file=stream)
  if told := to_go(folder, runs):
    print(told, file=stream)
  return counted


def to_go(folder, runs: list) -> str:
  """How much training there was and how much there will be, by the FLOPs; nothing while no run is over."""
  done = [(run, row) for run in runs if (row := folder.row(run)) and row.get('seconds')]
  waiting = [run for run in runs if folder.row(run) is None]
  spent, flops = sum(row['seconds'] for _, row in done), sum(run.cost for run, _ in done)
  if not (flops and waiting):
    return ''
  left = sum(run.cost for run in waiting) * spent / flops
  clock = text.clock
  return f'{clock(spent)} of training so far, about {clock(left)} to go, added up over the workers'


def show_plan(sweep: Sweep, runs: list[plan.Planned]) -> None:
  show_runs(runs, sweep.design.flops)
  if sweep.forecast:
    largest = max(sweep.design.budgets) * sweep.forecast
    print(f'then a forecast at {si(largest, "FLOPs")} and the run that tests it')


def show_status(sweep: Sweep, folder: Folder) -> int:
  runs = folder.plan()
  if not runs:
    raise UserError(f'{folder.path} holds no sweep: no plan.json; start it, or give its --workdir.')
  show_states(folder, runs)
  if sweep.design.law:
    print(findings.provisional_law(sweep, folder.rows(runs)))
  return 0
