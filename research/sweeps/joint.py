"""A run whose processes are on several hosts of a Ray cluster. The first holds its lease and starts the others.

If a process is lost, the others end too, and the run is assigned again: it goes on from its last checkpoint.
"""

import contextlib
import dataclasses
import functools
import os
import socket
import threading
from collections.abc import Iterator

from research.core import storage
from research.core.errors import UserError
from research.designs.plan import Planned
from research.parallel import processes, ray_gangs, ray_tasks
from research.parallel.ray_cluster import Needs
from research.sweeps import group
from research.sweeps.worker import Worker

# Seconds that this process has to notice by itself that another one was lost, before it ends.
GRACE = 20.0
LAST = 120.0  # seconds that the others may take to end after this one


def train_first(
  arguments: tuple[str, ...], names: tuple[str, ...], cpus: float, needs: dict
) -> str:
  """Trains one run as its first process; returns this host's name.

  Args:
    arguments: of the command `python -m research.sweep` of a worker.
    names: the run's, alone.
    cpus: processor cores of each process.
    needs: the fields of `Needs`.

  Raises:
    UserError: a host cannot take part.
  """
  plain = group.worker_of(arguments, 1.0)
  # A population has one process.
  sweep = dataclasses.replace(plain.sweep, population=1)
  worker = _First(sweep, plain.folder)
  worker.joined = functools.partial(_joined, worker, arguments, Needs(**needs))
  (name,) = names
  worker.do(group.planned(worker, name))
  if worker.refused:
    raise worker.refused
  return socket.gethostname()


class _First(Worker):
  """A worker whose runs have other processes.

  Attributes:
    refused: why a host cannot take part in any run.
  """

  refused: UserError | None = None


@contextlib.contextmanager
def _joined(worker: _First, arguments, needs: Needs, run: Planned) -> Iterator[None]:
  """Starts the other processes of a run, and joins them."""
  rest = ray_gangs.others(needs)
  folders = [worker.folder.path / 'workers']
  others = ray_tasks.Tasks('research.sweeps.joint', 'train_other', rest, folders, fresh=True)
  first = (_free_address(), needs.hosts)
  for number in range(1, needs.hosts):
    others.start(number, arguments, run.name, (*first, number))
  watch = _Watch(worker, others, run)
  try:
    _join((*first, 0))
    yield
    processes.leave()
    watch.wait()
  except UserError as error:
    # A missing process is no fault of the run, which a UserError would end for good.
    if processes.joined():
      raise
    raise ConnectionError(str(watch.why or error)) from error
  finally:
    watch.end()


def train_other(arguments: tuple[str, ...], name: str, cluster: tuple[str, int, int]) -> None:
  """Trains a run as one of its other processes.

  Args:
    cluster: (address of the first process, number of processes, number of this one).
  """
  from research.training import loop

  worker = group.worker_of(arguments, 1.0)
  run = group.planned(worker, name)
  _join(cluster)
  config = worker.config(run)
  with config.explains():
    loop.train(config.build(), worker.folder.run(run), config.text)
  processes.leave()


def _join(cluster: tuple[str, int, int]) -> None:
  # A TPU slice knows its processes itself.
  processes.initialize(processes.find() or processes.Cluster('Ray', *cluster))


def _free_address() -> str:
  import ray

  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
  return f'{ray.util.get_node_ip_address()}:{port}'


class _Watch:
  """A thread that looks at the other processes of a run, and ends this one where they are lost.

  A collective operation would wait for them for ever.

  Attributes:
    why: of the first one that was lost; '' while all run.
  """

  def __init__(self, worker: _First, others: ray_tasks.Tasks, run: Planned):
    self.worker = worker
    self.log = worker.folder.run(run) / 'log.txt'
    self.others = others
    self.why = ''
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()

  def _look(self) -> None:
    while self.others.pending:
      try:
        outcomes = self.others.ended(0.5)
      except UserError as error:  # a host without the project, or with another one
        self.worker.refused = error
        self.why = str(error)
      else:
        self.why = next((str(o.lost or o.error) for o in outcomes if o.lost or o.error), '')
      if self.why:
        if not self._over.wait(GRACE):
          with contextlib.suppress(OSError):
            storage.append(self.log, f'another process of the run was lost: {self.why}\n')
          os._exit(75)
        return

  def wait(self) -> None:
    """Waits until the others have ended; they do so when this process leaves the job."""
    self._over.set()
    self._thread.join(LAST)

  def end(self) -> None:
    """Ends the others that still run."""
    self._over.set()
    self.others.cancel()
