"""What a host of a cluster does for a sweep: it trains one group of runs, or its part of one run."""

import functools
import math
import socket
import time

from research.core import cli, configs, storage
from research.core.errors import UserError
from research.designs.plan import Planned
from research.parallel import processes, ray_cluster
from research.sweeps.folder import Folder
from research.sweeps.worker import Worker
from research.training import alike, interrupt, loop


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
  worker = _worker(arguments, cpus)
  # The plan grows when a forecast is registered, so its size tells whether it must be read again.
  plan = _plan(worker.folder.path, storage.size(worker.folder.path / 'plan.json'))
  group = [plan[name] for name in names]
  worker.alike = {Worker.kind(group[0]): group}
  try:
    for run in group:  # `do` trains the run's companions too, and then passes them by
      worker.do(run, whole=True)
  except interrupt.Interrupted:  # the host is being taken away, and the state is saved
    pass
  return socket.gethostname()


def train_on_hosts(
  arguments: tuple[str, ...], name: str, meeting: str, hosts: int, rank: int
) -> str:
  """Trains one run on several hosts, of which this is number `rank`; returns this host's name.

  The first of them takes the run's lease, and tells the others whether it got it. If one is lost, the others
  wait for it until the caller ends them.

  Args:
    arguments: as in `train_group`.
    meeting: a word that the hosts of this attempt alone have.

  Raises:
    UserError: the hosts did not meet.
  """
  worker = _worker(arguments, 0)
  planned = _plan(worker.folder.path, storage.size(worker.folder.path / 'plan.json'))[name]
  place = worker.folder.path / 'workers' / f'{meeting}.address'
  address = _call_together(place) if rank == 0 else _called_to(place)
  processes.initialize(processes.Cluster('Ray', address, hosts, rank), log=lambda line: None)
  try:
    if rank == 0:
      first = _First(worker.sweep, worker.folder)
      first.do(planned)
      if not first.has_told:  # it did not get the lease, or the run is over
        processes.exchange('lease', '')
    elif processes.exchange('lease', '')[0]:
      config = worker.sweep.config(planned)
      loop.train(config.build(), worker.folder.run(planned), config.text)
  except interrupt.Interrupted:
    pass
  return socket.gethostname()


class _First(Worker):
  """A worker that tells the other hosts of its run when to begin."""

  has_told = False

  def train(self, members: list[tuple]) -> None:
    self.has_told = True
    processes.exchange('lease', 'taken')
    ((run, lease),) = members
    try:
      super().train(members)
    except (UserError, interrupt.Interrupted):
      raise
    except Exception as error:
      # A lost neighbour and a fault of the run look alike here. As of a worker that vanished, it counts as a
      # failure of the run only where there is no newer checkpoint.
      if self.folder.step(run) <= lease.step:
        raise
      raise interrupt.Interrupted(f'{type(error).__name__}: {error}') from error


def _call_together(place) -> str:
  """Writes this host's address, with a port that is free now, for the other hosts to read."""
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
  address = f'{ray_cluster.address_of_this_host()}:{port}'
  storage.write_atomic(place, address)
  return address


def _called_to(place) -> str:
  """The address that the first host wrote.

  Raises:
    UserError: it did not within `processes.TIMEOUT`.
  """
  end = time.monotonic() + processes.TIMEOUT
  while time.monotonic() < end:
    try:
      return place.read_text()
    except OSError:
      time.sleep(0.2)
  raise UserError(f'the first host of the run did not come within {processes.TIMEOUT:.0f} s.')


@functools.cache
def _worker(arguments: tuple[str, ...], cpus: float) -> Worker:
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


@functools.lru_cache(maxsize=1)
def _plan(path, size: int) -> dict[str, Planned]:
  return {run.name: run for run in Folder(path).plan()}
