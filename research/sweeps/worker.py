"""The state of a sweep, and the workers that advance it: any number of them, started anyhow.

State is the folder alone: a directory a run, with a lease while somebody does it and a row when it is over.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import time
from typing import TYPE_CHECKING

from research.checkpoints.folders import copy_checkpoint, saved_steps
from research.core import storage
from research.core.errors import UserError
from research.designs.plan import Planned
from research.sweeps.folder import Folder

if TYPE_CHECKING:
  from research.sweeps.sweep import Sweep


def populations(sweep: 'Sweep', runs: list[Planned]) -> list[int]:
  """How many members they have, if each is trained whole: of 1 where runs are alone."""
  alike = collections.Counter(run.name if run.parent else Worker.kind(run) for run in runs)
  return [
    min(sweep.population, n - i) for n in alike.values() for i in range(0, n, sweep.population)
  ]


class Worker:
  """Takes leases of runs, does them, and leaves their rows; one of any number that share the folder."""

  def __init__(self, sweep: 'Sweep', folder: Folder, peers: int = 1):
    from research.sweeps import leases  # tensorstore: only in a process that works

    self.sweep, self.folder, self.peers = sweep, folder, peers
    self.leases = leases.Leases(folder.path / 'runs', sweep.lease)
    self.alike: dict[tuple, list[Planned]] = {}
    self.shares_cores = False

  def work(self, runs: list[Planned], poll: float = 1.0) -> None:
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

  def share_cores(self, runs: list[Planned]) -> None:
    """Where `runs` make populations, the cores of this process are shared by their members."""
    waiting = [run for run in runs if self.folder.row(run) is None]
    largest = max(populations(self.sweep, waiting), default=1)
    if largest > 1:
      from research.training import alike as alike_module

      self.shares_cores = alike_module.share_cores(largest)

  @staticmethod
  def kind(run: Planned) -> tuple:
    """Runs of one shape agree in this, and seldom do others."""
    return run.size.name, run.steps, run.batch_size, run.parent

  def whole(self, planned: Planned, left: float) -> bool:
    """Whether one worker takes a whole population of this run's shape, so that nobody else compiles for it.

    Else the workers divide it: of the FLOPs that are `left`, those without a share would have too few.
    """
    if planned.parent:
      return False
    members = min(self.sweep.population, len(self.alike[self.kind(planned)]))
    return self.peers * members * planned.cost <= left

  def do(self, planned: Planned, whole: bool = False) -> bool:
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

  def ready(self, planned: Planned) -> bool:
    """Whether the checkpoint that it starts from is there, if it starts from one."""
    if planned.parent is None or self.folder.step(planned):
      return True
    trunk = dataclasses.replace(planned, name=planned.parent)
    if planned.fork in saved_steps(self.folder.run(trunk) / 'checkpoints'):
      return True
    if row := self.folder.row(trunk):
      why = row.get('reason') or 'it has no such checkpoint'
      self.folder.fail(
        planned, f'{planned.parent}, whose step {planned.fork} it starts from: {why}'
      )
    return False

  def take(self, planned: Planned):
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

  def companions(self, planned: Planned, held, whole: bool) -> list[tuple]:
    """Runs of its shape to train with this one at once, with their leases: all, or this worker's share."""
    alike = [run for run in self.alike.get(self.kind(planned), []) if run is not planned]
    # What has failed before is tried alone, so that it spoils no other.
    if self.sweep.population == 1 or held.failures or planned.parent or not alike:
      return []
    alike = [run for run in alike if self.folder.row(run) is None]
    most = self.sweep.population
    if not whole:
      most = min(most, math.ceil((len(alike) + 1) / self.peers))
    from research.training import alike as alike_module
    from research.training.alike import possible

    run, found = self.sweep.config(planned).build(), []
    if not possible(run):
      return []
    shape = alike_module.shape(run)
    for run in alike:
      if len(found) + 1 >= most:
        break
      if alike_module.shape(self.sweep.config(run).build()) != shape:
        continue
      if lease := self.take(run):
        if lease.failures:
          lease.release()
        else:
          found.append((run, lease))
    return found

  def attempt(self, members: list[tuple]) -> None:
    """Trains what is held; a failure is remembered, and after too many the run is over."""
    from research.sweeps import leases
    from research.training import interrupt

    folders = [self.folder.run(run) for run, _ in members]
    files = [f / name for f in folders for name in ('metrics.jsonl', 'log.txt')]
    progress = lambda: [storage.size(file) for file in files]
    held = [lease for _, lease in members]
    try:
      with leases.Heartbeat(held, progress, self.sweep.patience, lost=_give_up):
        self.train(members)
    except interrupt.Interrupted:
      raise
    except Exception as error:
      if isinstance(error, UserError) and len(members) == 1:  # the same again every time
        return self.folder.fail(members[0][0], str(error))
      reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
      for run, lease in members:
        if self.folder.row(run):
          continue
        with contextlib.suppress(OSError):
          storage.append(self.folder.run(run) / 'log.txt', reason + '\n')
        lease.fail(reason)
        if lease.failures > self.sweep.retries:
          self.folder.fail(run, f'{reason} ({lease.failures} attempts)')

  def train(self, members: list[tuple]) -> None:
    from research.training import loop, population
    from research.training.alike import possible  # jax: only in the process that trains

    with contextlib.ExitStack() as stack:
      made, logs = [], []
      for run, _ in members:
        workdir = self.folder.run(run)
        workdir.mkdir(parents=True, exist_ok=True)
        if run.parent and not self.folder.step(run):
          self.branch(run)
        logs.append(stack.enter_context(storage.appending(workdir / 'log.txt')))
        made.append(self.sweep.config(run))
      workdirs = [self.folder.run(run) for run, _ in members]
      with made[0].explains():
        runs, texts = [config.build() for config in made], [config.text for config in made]
        # Where a core is a device (`share_cores`), a run that is alone has one of them.
        if len(runs) == 1 and not (self.shares_cores and possible(runs[0])):
          loop.train(runs[0], workdirs[0], texts[0], stream=logs[0])
        else:
          population.train_population(runs, workdirs, texts, logs)

  def branch(self, planned: Planned) -> None:
    """Gives a run the checkpoint that it starts from: from there on it is a run that was stopped."""
    trunk = self.folder.run(dataclasses.replace(planned, name=planned.parent))
    run, saved = self.folder.run(planned), f'checkpoints/{planned.fork}'
    curve = [r for r in storage.read_rows(trunk / 'metrics.jsonl') if r['step'] <= planned.fork]
    lines = ''.join(json.dumps(row) + '\n' for row in curve if 'loss' in row)
    storage.write_atomic(run / 'metrics.jsonl', lines)
    copy_checkpoint(trunk / saved, run / saved)


def _give_up() -> None:
  """Another worker has this one's run: not a byte more into its folder."""
  os._exit(75)
