"""The two processes of a sweep's command: the one that starts workers and waits, and a worker."""

import functools
import os
import sys

from research.designs.plan import Planned
from research.sweeps import leases
from research.sweeps.dispatch import Dispatch
from research.sweeps.folder import Folder
from research.sweeps.launchers.job import Job
from research.sweeps.status import Table
from research.sweeps.sweep import Sweep
from research.sweeps.worker import Worker, populations
from research.training import interrupt


def get_done(flags, sweep: Sweep, runs: list[Planned], folder: Folder, table: Table) -> bool:
  """Starts workers by the launcher until every run is over; False where the user must start them."""

  def waiting() -> list[Planned]:
    return [run for run in runs if folder.row(run) is None]

  def todo() -> int:
    return len(waiting())

  def at_once() -> int:
    return len(populations(sweep, waiting()))

  arguments = [f'--gin_file={file}' for file in flags.gin_file] + [f'--gin.{b}' for b in flags.gin]
  job = Job(
    arguments=(*arguments, f'--workdir={folder.path}', '--worker'),
    workdir=folder.path,
    todo=todo,
    at_once=at_once,
    watch=functools.partial(table, runs),
    hung=functools.partial(hung, sweep, runs, folder),
    dispatch=functools.partial(Dispatch, sweep, folder, runs),
  )
  if waiting() and not sweep.launcher.run(job):
    return False
  table(runs, last=True)
  return True


def hung(sweep: Sweep, runs: list[Planned], folder: Folder) -> set[int]:
  """The process ids on this machine that still own a lease that has expired."""
  store = leases.Leases(folder.path / 'runs', sweep.lease)
  waiting = [run for run in runs if folder.row(run) is None and folder.run(run).exists()]
  entries = [entry for run in waiting if (entry := store.read(run.name))]
  return {e.pid for e in entries if e.owner and e.expired and e.host == store.host}


def work(sweep: Sweep, folder: Folder, peers: int) -> int:
  """Does the runs of a sweep until all are over, as one of `peers` workers; returns the exit status."""
  worker = Worker(sweep, folder, peers)
  runs = folder.plan()
  worker.share_cores(runs)
  # The launcher sees by this file that the worker got as far as taking runs.
  (folder.path / 'workers').mkdir(exist_ok=True)
  (folder.path / 'workers' / str(os.getpid())).touch()
  try:
    worker.work(runs)
  except interrupt.Interrupted as stop:
    print(stop, file=sys.stderr)
    return 143  # as a shell reports SIGTERM
  return 0
