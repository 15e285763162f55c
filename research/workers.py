"""The state of a sweep, and the workers that advance it: any number of them, started anyhow.

State is the folder alone: a directory a run, with a lease while somebody does it and a row when it is over.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from typing import TYPE_CHECKING

from research.errors import UserError
from research.scaling import designs
from research.training import metrics, places

if TYPE_CHECKING:
  from research.sweep import Sweep


class Folder:
  """The state of a sweep: its run directories. Any number of workers, started anyhow, may share it."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._rows: dict[str, dict] = {}  # of runs that are over: rows do not change

  def run(self, planned: designs.Planned) -> pathlib.Path:
    return self.path / 'runs' / planned.name

  def row(self, planned: designs.Planned) -> dict | None:
    """The finished (or failed) run's row with what the sweep knows of it; None while there is none."""
    if planned.name not in self._rows:
      try:
        row = json.loads((self.run(planned) / 'run.json').read_text())
      except FileNotFoundError:
        return None
      facts = {'run': planned.name, 'role': planned.role, 'budget': planned.budget}
      self._rows[planned.name] = {**facts, **row}
    return self._rows[planned.name]

  def fail(self, planned: designs.Planned, reason: str) -> None:
    """The run is over, with no result."""
    self.run(planned).mkdir(parents=True, exist_ok=True)
    row = json.dumps({'status': 'failed', 'reason': reason})
    metrics.write_atomic(self.run(planned) / 'run.json', row)

  def step(self, planned: designs.Planned) -> int:
    """How far a run is by its checkpoints."""
    return max(places.saved_steps(self.run(planned) / 'checkpoints'), default=0)

  def plan(self) -> list[designs.Planned]:
    """The runs that this sweep was started with, the forecast's among them once it is registered."""
    path = self.path / 'plan.json'
    if not path.exists():
      return []
    runs = json.loads(path.read_text())
    parse = lambda run: {
      'size': designs.Size(**run['size']),
      'settings': tuple(run.get('settings', ())),
    }
    return [designs.Planned(**run | parse(run)) for run in runs]

  def register(self, runs: list[designs.Planned]) -> None:
    """Adds runs to the plan.

    Raises:
      UserError: a run of that name is there with other settings.
    """
    old = {run.name: run for run in self.plan()}
    for run in runs:
      there = old.setdefault(run.name, run)
      if run != dataclasses.replace(there, budget=run.budget):  # a label, and no setting
        raise UserError(
          f'{self.path} holds a sweep in which {run.name} is another run; choose another --workdir.'
        )
    plan = json.dumps([dataclasses.asdict(run) for run in old.values()], indent=1)
    metrics.write_atomic(self.path / 'plan.json', plan)

  def rows(self, runs: list[designs.Planned]) -> list[dict]:
    return [row for row in map(self.row, runs) if row]

  def curve(self, planned: designs.Planned) -> list[dict]:
    return metrics.read_rows(self.run(planned) / 'metrics.jsonl')


def populations(sweep: 'Sweep', runs: list[designs.Planned]) -> list[int]:
  """How many members they have, if each is trained whole: of 1 where runs are alone."""
  alike = collections.Counter(run.name if run.parent else Worker.kind(run) for run in runs)
  return [
    min(sweep.population, n - i) for n in alike.values() for i in range(0, n, sweep.population)
  ]


class Worker:
  """Takes leases of runs, does them, and leaves their rows; one of any number that share the folder."""

  def __init__(self, sweep: 'Sweep', folder: Folder, peers: int = 1):
    from research import leases  # tensorstore: only in a process that works

    self.sweep, self.folder, self.peers = sweep, folder, peers
    self.leases = leases.Leases(folder.path / 'runs', sweep.lease)
    self.alike: dict[tuple, list[designs.Planned]] = {}
    self.shares_cores = False

  def work(self, runs: list[designs.Planned], poll: float = 1.0) -> None:
    """Until every run is over: those that nobody has, the most expensive first, so that the last are short.

    What others hold is waited for: they may yet lose it.
    """
    for run in runs:
      self.alike.setdefault(self.kind(run), []).append(run)
    runs = sorted(runs, key=lambda run: -run.cost)
    while runs := [run for run in runs if self.folder.row(run) is None]:
      done, left, seen = 0, sum(run.cost for run in runs), collections.Counter()
      for planned in runs:
        kind, whole = self.kind(planned), self.whole(planned, left)
        # Workers begin a population at the same run of its shape: who comes late takes another shape.
        if not whole or seen[kind] % self.sweep.population == 0:
          done += self.do(planned, whole)
        seen[kind] += 1
        left -= planned.cost
      if not done:
        time.sleep(poll)

  def share_cores(self, runs: list[designs.Planned]) -> None:
    """Where `runs` make populations, the cores of this process are shared by their members."""
    waiting = [run for run in runs if self.folder.row(run) is None]
    largest = max(populations(self.sweep, waiting), default=1)
    if largest > 1:
      from research import population

      self.shares_cores = population.share_cores(largest)

  @staticmethod
  def kind(run: designs.Planned) -> tuple:
    """Runs of one shape agree in this, and seldom do others."""
    return run.size.name, run.steps, run.batch_size, run.parent

  def whole(self, planned: designs.Planned, left: float) -> bool:
    """Whether one worker takes a whole population of this run's shape, so that nobody else compiles for it.

    Else the workers divide it: of the FLOPs that are `left`, those without a share would have too few.
    """
    if planned.parent:
      return False
    members = min(self.sweep.population, len(self.alike[self.kind(planned)]))
    return self.peers * members * planned.cost <= left

  def do(self, planned: designs.Planned, whole: bool = False) -> bool:
    """Does a run, and some that are like it, unless it is over or not to be had; True when it did something."""
    if self.folder.row(planned) or not self.ready(planned):
      return False
    held = self.take(planned)
    if held is None:
      return False
    members = [(planned, held), *self.companions(planned, held, whole)]
    try:
      self.attempt(members)
    finally:
      for _, lease in members:
        with contextlib.suppress(Exception):  # lost, or the disk is full: it will run out
          if not lease.over:
            lease.release()
    return True

  def ready(self, planned: designs.Planned) -> bool:
    """Whether the checkpoint that it starts from is there, if it starts from one."""
    if planned.parent is None or self.folder.step(planned):
      return True
    trunk = dataclasses.replace(planned, name=planned.parent)
    if planned.fork in places.saved_steps(self.folder.run(trunk) / 'checkpoints'):
      return True
    if row := self.folder.row(trunk):
      why = row.get('reason') or 'it has no such checkpoint'
      self.folder.fail(
        planned, f'{planned.parent}, whose step {planned.fork} it starts from: {why}'
      )
    return False

  def take(self, planned: designs.Planned):
    """The run's lease; None where it is not to be had, or where the run has failed too often."""
    held = self.leases.take(planned.name, self.folder.step(planned))
    if held is None:
      return None
    if self.folder.row(planned):
      held.release()
      return None
    if held.failures > self.sweep.retries:
      self.folder.fail(planned, f'{held.reason} ({held.failures} attempts)')
      held.release()
      return None
    return held

  def companions(self, planned: designs.Planned, held, whole: bool) -> list[tuple]:
    """Runs of its shape to train with this one at once, with their leases: all, or this worker's share."""
    alike = [run for run in self.alike.get(self.kind(planned), []) if run is not planned]
    # What has failed before is tried alone, so that it spoils no other.
    if self.sweep.population == 1 or held.failures or planned.parent or not alike:
      return []
    alike = [run for run in alike if self.folder.row(run) is None]
    most = self.sweep.population
    if not whole:
      most = min(most, math.ceil((len(alike) + 1) / self.peers))
    from research import population

    run, found = self.sweep.config(planned).build(), []
    if not population.possible(run):
      return []
    shape = population.shape(run)
    for run in alike:
      if len(found) + 1 >= most:
        break
      if population.shape(self.sweep.config(run).build()) != shape:
        continue
      if lease := self.take(run):
        if lease.failures:
          lease.release()
        else:
          found.append((run, lease))
    return found

  def attempt(self, members: list[tuple]) -> None:
    """Trains what is held; a failure is remembered, and after too many the run is over."""
    from research import leases, train

    folders = [self.folder.run(run) for run, _ in members]
    files = [f / name for f in folders for name in ('metrics.jsonl', 'log.txt')]
    progress = lambda: [places.size(file) for file in files]
    held = [lease for _, lease in members]
    try:
      with leases.Heartbeat(held, progress, self.sweep.patience, lost=_give_up):
        self.train(members)
    except train.Interrupted:
      raise
    except Exception as error:
      if isinstance(error, UserError) and len(members) == 1:  # the same again every time
        return self.folder.fail(members[0][0], str(error))
      reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
      for run, lease in members:
        if self.folder.row(run):
          continue
        with contextlib.suppress(OSError):
          places.append(self.folder.run(run) / 'log.txt', reason + '\n')
        lease.fail(reason)
        if lease.failures > self.sweep.retries:
          self.folder.fail(run, f'{reason} ({lease.failures} attempts)')

  def train(self, members: list[tuple]) -> None:
    from research import population, train  # jax: only in the process that trains

    with contextlib.ExitStack() as stack:
      made, logs = [], []
      for run, _ in members:
        workdir = self.folder.run(run)
        workdir.mkdir(parents=True, exist_ok=True)
        if run.parent and not self.folder.step(run):
          self.branch(run)
        logs.append(stack.enter_context(places.appending(workdir / 'log.txt')))
        made.append(self.sweep.config(run))
      workdirs = [self.folder.run(run) for run, _ in members]
      with made[0].explains():
        runs, texts = [config.build() for config in made], [config.text for config in made]
        # Where a core is a device (`share_cores`), a run that is alone has one of them.
        if len(runs) == 1 and not (self.shares_cores and population.possible(runs[0])):
          train.train(runs[0], workdirs[0], texts[0], stream=logs[0])
        else:
          population.train_population(runs, workdirs, texts, logs)

  def branch(self, planned: designs.Planned) -> None:
    """Gives a run the checkpoint that it starts from: from there on it is a run that was stopped."""
    trunk = self.folder.run(dataclasses.replace(planned, name=planned.parent))
    run, saved = self.folder.run(planned), f'checkpoints/{planned.fork}'
    curve = [r for r in metrics.read_rows(trunk / 'metrics.jsonl') if r['step'] <= planned.fork]
    lines = ''.join(json.dumps(row) + '\n' for row in curve if 'loss' in row)
    metrics.write_atomic(run / 'metrics.jsonl', lines)
    places.copy_checkpoint(trunk / saved, run / saved)


def _give_up() -> None:
  """Another worker has this one's run: not a byte more into its folder."""
  os._exit(75)
