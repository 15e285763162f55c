"""FIXME: say what this module is."""

import os
import sys

from research.designs import plan
from research.sweeps.folder import Folder
from research.sweeps.launchers import by_name
from research.sweeps.launchers.job import Job
from research.sweeps.sweep import Sweep
from research.sweeps.worker import Worker, populations


def get_done(flags, sweep: Sweep, runs: list[plan.Planned], folder: Folder, table) -> bool:
  """Every run over, by whatever starts the workers; False where that is left to the user."""
  launcher = by_name.named(flags.launcher) if flags.launcher else sweep.launcher
  waiting = lambda: [run for run in runs if folder.row(run) is None]
  todo = lambda: len(waiting())
  arguments = [f'--gin_file={file}' for file in flags.gin_file] + [f'--gin.{b}' for b in flags.gin]
  job = Job(
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


def hung(sweep: Sweep, runs: list[plan.Planned], folder: Folder) -> set[int]:
  """Processes of this machine whose lease has run out while they have it."""
  from research.sweeps import leases

  store = leases.Leases(folder.path / 'runs', sweep.lease)
  waiting = [run for run in runs if folder.row(run) is None and folder.run(run).exists()]
  found = [entry for run in waiting if (entry := store.read(run.name))]
  return {e.pid for e in found if e.owner and e.expired and e.host == store.host}


def work(sweep: Sweep, folder: Folder, peers: int) -> int:
  """A worker's process."""
  from research.training import interrupt

  worker, runs = Worker(sweep, folder, peers), folder.plan()
  worker.share_cores(runs)
  (folder.path / 'workers').mkdir(exist_ok=True)
  (folder.path / 'workers' / str(os.getpid())).touch()  # it got this far
  try:
    worker.work(runs)
  except interrupt.Interrupted as stop:
    print(stop, file=sys.stderr)
    return 143
  return 0
