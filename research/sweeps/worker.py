"""A worker of a sweep: takes the lease of a run, trains the run, writes its row, and takes the next.

Any number of workers may share the folder of a sweep. Each run has a directory there, with a lease while a
worker trains it and a row when it is over. Workers know of each other through these files alone.
"""

import collections
import contextlib
import dataclasses
import json
import math
import operator
import os
import time
from collections.abc import Callable

from research.checkpoints.folders import copy_checkpoint, saved_steps
from research.core import cli, storage
from research.core.errors import UserError, in_a_line
from research.designs.plan import Planned
from research.sweeps import leases
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep
from research.training import alike as alike_module
from research.training import interrupt


def populations(sweep: Sweep, runs: list[Planned]) -> list[int]:
  """The sizes of the populations that `runs` form; a run that trains alone counts as 1."""
  alike = collections.Counter(run.name if run.parent else Worker.kind(run) for run in runs)
  return [
    min(sweep.population, count - start)
    for count in alike.values()
    for start in range(0, count, sweep.population)
  ]


class Worker:
  """One of the workers that share the folder of a sweep.

  Args:
    peers: how many workers share the runs, including this one.

  Attributes:
    joined: a context in which a run is trained that is no population, for those that have other processes.
  """

  def __init__(self, sweep: Sweep, folder: Folder, peers: int = 1):
    self.joined: Callable = contextlib.nullcontext
    self.sweep = sweep
    self.folder = folder
    self.peers = peers
    self.leases = leases.Leases(folder.path / 'runs', sweep.lease)
    self.alike: dict[tuple, list[Planned]] = {}
    self.shares_cores = False

  def work(self, runs: list[Planned], poll: float = 1.0) -> None:
    """Works until every run is over.

    Takes the most expensive runs first, so that the last ones are short and all workers end at about the same
    time. Waits for the runs of other workers, because another worker may lose one.

    Args:
      poll: seconds to wait when no run is free.
    """
    for run in runs:
      self.alike.setdefault(self.kind(run), []).append(run)
    runs = sorted(runs, key=operator.attrgetter('cost'), reverse=True)
    while runs := [run for run in runs if self.folder.row(run) is None]:
      trained_any = False
      flops_left = sum(run.cost for run in runs)
      position = collections.Counter()  # of a run among those of its shape
      for planned in runs:
        kind = self.kind(planned)
        whole = self.whole(planned, flops_left)
        # All workers begin a population at the same run of its shape. So a late worker finds its lease taken
        # and goes on to another shape, instead of splitting this one.
        if not whole or position[kind] % self.sweep.population == 0:
          trained_any |= self.do(planned, whole)
        position[kind] += 1
        flops_left -= planned.cost
      if not trained_any:
        time.sleep(poll)

  def share_cores(self, runs: list[Planned]) -> None:
    """Makes each core of this process a device, where `runs` form populations, whose members can use them."""
    waiting = [run for run in runs if self.folder.row(run) is None]
    largest = max(populations(self.sweep, waiting), default=1)
    if largest > 1:
      self.shares_cores = alike_module.share_cores(largest)

  @staticmethod
  def kind(run: Planned) -> tuple:
    """A quick guess at the shape of a run; `companions` compares the whole runs."""
    return run.size.name, run.steps, run.batch_size, run.parent

  def whole(self, planned: Planned, flops_left: float) -> bool:
    """Whether this worker takes a whole population of the run's shape, so that no other compiles for it.

    Towards the end of a sweep the workers divide a population instead. Otherwise the workers without a share
    in it would run out of work, out of the FLOPs that are `left`.
    """
    if planned.parent:
      return False
    members = min(self.sweep.population, len(self.alike[self.kind(planned)]))
    return self.peers * members * planned.cost <= flops_left

  def do(self, planned: Planned, whole: bool = False) -> bool:
    """Trains a run and others of its shape. False where the run is over, not ready, or another worker's."""
    if self.folder.row(planned) or not self.ready(planned):
      return False
    lease = self.take(planned)
    if lease is None:
      return False
    members = [(planned, lease), *self.companions(planned, lease, whole)]
    try:
      self.attempt(members)
    finally:
      for _, lease in members:
        # A lease that cannot be released (it is lost, or the disk is full) expires by itself.
        with contextlib.suppress(Exception):
          if not lease.over:
            lease.release()
    return True

  def ready(self, planned: Planned) -> bool:
    """Whether the run can start. A run that needs another one fails where that failed."""
    if planned.parent is None or self.folder.step(planned):
      return True
    row = self.folder.row(self._parent(planned))
    if planned.method:  # its row tells of the parent's, so that the parent must be over
      begins = 'the end'
      can_start = row is not None and row['status'] == 'finished'
      why = 'its loss was not finite'
    else:
      begins = f'step {planned.fork}'
      can_start = planned.fork in saved_steps(self._parent_folder(planned) / 'checkpoints')
      why = 'it has no such checkpoint'
    if row and not can_start:
      reason = row.get('reason') or why
      self.folder.fail(
        planned, f'it starts from {begins} of {planned.parent}, which failed: {reason}'
      )
    return can_start

  def _parent(self, planned: Planned) -> Planned:
    """What the folder knows of a run's parent: its name."""
    return dataclasses.replace(planned, name=planned.parent)

  def _parent_folder(self, planned: Planned):
    return self.folder.run(self._parent(planned))

  def take(self, planned: Planned):
    """The lease of the run; None where another worker has it, or where the run failed too often."""
    lease = self.leases.take(planned.name, self.folder.step(planned))
    if lease is None:
      return None
    if self.folder.row(planned):
      lease.release()
      return None
    if lease.failures > self.sweep.retries:
      self.folder.fail(planned, f'{lease.reason} ({lease.failures} attempts)')
      lease.release()
      return None
    return lease

  def companions(self, planned: Planned, lease, whole: bool) -> list[tuple]:
    """(run, lease) of the runs to train with this one: all of its shape, or this worker's share of them."""
    alike = [run for run in self.alike.get(self.kind(planned), []) if run is not planned]
    # A run that failed before is retried alone, so that it cannot fail the others.
    if self.sweep.population == 1 or lease.failures or planned.parent or not alike:
      return []
    alike = [run for run in alike if self.folder.row(run) is None]
    largest = self.sweep.population
    if not whole:
      largest = min(largest, math.ceil((len(alike) + 1) / self.peers))
    built = self.sweep.config(planned).build()
    if not alike_module.possible(built):
      return []
    shape = alike_module.shape(built)
    companions = []
    for run in alike:
      if len(companions) + 1 >= largest:
        break
      if alike_module.shape(self.sweep.config(run).build()) != shape:
        continue
      if other := self.take(run):
        if other.failures:  # it is retried alone, too
          other.release()
        else:
          companions.append((run, other))
    return companions

  def attempt(self, members: list[tuple]) -> None:
    """Trains runs whose leases this worker holds. Records a failure, and ends a run that failed too often.

    Args:
      members: a (run, lease) each.
    """
    folders = [self.folder.run(run) for run, _ in members]
    files = [f / name for f in folders for name in ('metrics.jsonl', 'log.txt')]

    def progress() -> list[int]:
      return [storage.size(file) for file in files]

    try:
      with leases.Heartbeat(
        [lease for _, lease in members], progress, self.sweep.patience, lost=_give_up
      ):
        self.train(members)
    except interrupt.Interrupted:
      raise
    except Exception as error:
      # A wrong input stays wrong, so there is no retry; a full disk may have room again. Among several
      # members nobody knows whose input it is.
      wrong_input = isinstance(error, UserError) and cli.machine_fault(error) is None
      if wrong_input and len(members) == 1:
        return self.folder.fail(members[0][0], str(error))
      reason = in_a_line(error)
      for run, lease in members:
        if self.folder.row(run):
          continue
        with contextlib.suppress(OSError):
          storage.append(self.folder.run(run) / 'log.txt', reason + '\n')
        lease.fail(reason)
        if lease.failures > self.sweep.retries:
          self.folder.fail(run, f'{reason} ({lease.failures} attempts)')

  def train(self, members: list[tuple]) -> None:
    """Trains the members to the end: one by itself, several as a population."""
    from research.training import loop, population  # Orbax and more: only in a process that trains

    with contextlib.ExitStack() as stack:
      configs = []
      logs = []
      for run, _ in members:
        workdir = self.folder.run(run)
        workdir.mkdir(parents=True, exist_ok=True)
        if run.parent and not run.method and not self.folder.step(run):
          self.branch(run)
        logs.append(stack.enter_context(storage.appending(workdir / 'log.txt')))
        configs.append(self.config(run))
      workdirs = [self.folder.run(run) for run, _ in members]
      with configs[0].explains():
        runs = [config.build() for config in configs]
        texts = [config.text for config in configs]
        # Where each core is a device (`share_cores`), a single run would spread over all of them. As a
        # population of one it uses one.
        if len(runs) == 1 and not (self.shares_cores and alike_module.possible(runs[0])):
          with self.joined(members[0][0]):
            loop.train(runs[0], workdirs[0], texts[0], stream=logs[0])
        else:
          population.train_population(runs, workdirs, texts, logs)

  def config(self, planned: Planned):
    """The configuration of a run."""
    parent = str(self._parent_folder(planned)) if planned.method else ''
    return self.sweep.config(planned, parent)

  def branch(self, planned: Planned) -> None:
    """Copies the trunk's checkpoint into the folder of a branch, so that the branch resumes from it."""
    trunk = self._parent_folder(planned)
    run = self.folder.run(planned)
    saved = f'checkpoints/{planned.fork}'
    curve = [r for r in storage.read_rows(trunk / 'metrics.jsonl') if r['step'] <= planned.fork]
    lines = ''.join(json.dumps(row) + '\n' for row in curve if 'loss' in row)
    storage.write_atomic(run / 'metrics.jsonl', lines)
    copy_checkpoint(trunk / saved, run / saved)


def _give_up() -> None:
  """Ends the process at once. Another worker has its run, so this one must not write to it any more."""
  os._exit(75)
