"""What a host of a cluster does for a sweep: it trains one group of runs, and keeps the sweep for the next."""

import functools
import math
import socket

from research.core import cli, configs, storage
from research.designs.plan import Planned
from research.sweeps.folder import Folder
from research.sweeps.worker import Worker
from research.training import alike, interrupt


def train_group(arguments: tuple[str, ...], names: tuple[str, ...], cpus: float) -> str:
  """Trains the named runs of a sweep, as a population where they form one; returns this host's name.

  A run whose lease another worker has is left to it. A run that fails is retried by whoever is given it next:
  its lease says how often it failed, and its checkpoints where it goes on.

  Args:
    arguments: of the command `python -m research.sweep` of a worker.
    cpus: processor cores that a task has; a member of a population gets one of them.

  Raises:
    UserError: this host cannot read the sweep's files.
  """
  worker = worker_of(arguments, cpus)
  group = [planned(worker, name) for name in names]
  worker.alike = {Worker.kind(group[0]): group}
  try:
    for run in group:  # `do` trains the run's companions too, and then passes them by
      worker.do(run, whole=True)
  except interrupt.Interrupted:  # the host is being taken away, and the state is saved
    pass
  return socket.gethostname()


@functools.cache
def worker_of(arguments: tuple[str, ...], cpus: float) -> Worker:
  """The worker of this process, which trains all groups that the process is given."""
  from research.training.program import keep_compiled

  parser = cli.parser('sweep', '')
  parser.add_argument('--workdir')
  parser.add_argument('--worker', action='store_true')
  flags = cli.parse(parser, list(arguments))
  sweep = configs.load(flags.gin_file, flags.gin, root='SWEEP').build()
  worker = Worker(sweep, Folder(storage.place(flags.workdir)))
  worker.shares_cores = alike.share_cores(min(sweep.population, math.floor(cpus)))
  keep_compiled()
  return worker


def planned(worker: Worker, name: str) -> Planned:
  """The run of this name in the worker's sweep."""
  # The plan grows when a forecast is registered, so its size tells whether it must be read again.
  return _plan(worker.folder.path, storage.size(worker.folder.path / 'plan.json'))[name]


@functools.lru_cache(maxsize=1)
def _plan(path, size: int) -> dict[str, Planned]:
  return {run.name: run for run in Folder(path).plan()}
