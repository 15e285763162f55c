"""A real Ray cluster on this machine: a head without processors, and raylets that stand for hosts."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import tempfile
import time
from collections.abc import Iterator

from research.data import cleaning
from research.parallel import ray_cluster, ray_gangs, ray_tasks

STORE = 80 << 20  # bytes of shared memory a raylet; Ray's least is 75 MiB


class Hosts:
  """Raylets of one cluster, each with one processor, and with an object store and processes of its own.

  Attributes:
    address: HOST:PORT of the head.
    jobs: the URL of the head's dashboard, which takes jobs; '' where it has none.
    raylets: that are alive.
  """

  def __init__(self, cluster, jobs: str = ''):
    self._cluster = cluster
    self.address: str = cluster.address
    self.jobs = jobs
    self.raylets: list = []

  def add(self, **resources: float):
    """Starts a raylet, with these resources of Ray beside its processor, and returns it."""
    with _as_a_user():
      added = self._cluster.add_node(**_options(), num_cpus=1, resources=resources)
    self.raylets.append(added)
    return self.raylets[-1]

  @staticmethod
  def pid(raylet) -> int:
    """The process of a raylet, which starts those of its tasks."""
    return raylet.all_processes['raylet'][0].process.pid

  def busy(self, raylet, task: str) -> bool:
    """Whether a task whose name begins so runs on a raylet."""
    return any(f'ray::{task}' in _command(pid) for pid in descendants(self.pid(raylet)))

  def kill(self, raylet) -> None:
    """SIGKILL to a raylet and to the workers that it started, as if the power of its host failed."""
    self.raylets.remove(raylet)
    first = self.pid(raylet)
    for pid in (first, *descendants(first)):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    self._cluster.remove_node(raylet, allow_graceful=False)


@contextlib.contextmanager
def started(hosts: int = 3, dashboard: bool = False) -> Iterator[Hosts]:
  """A cluster of so many hosts, which ends with the block. pytest skips where Ray is not installed.

  Args:
    dashboard: the head has one, and an agent, so that it takes jobs.
  """
  import pytest

  pytest.importorskip('ray')
  from ray.cluster_utils import Cluster

  os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
  # Cluster writes the head's address into Ray's own folder, which a machine without an earlier cluster lacks.
  os.makedirs('/tmp/ray', exist_ok=True)
  ports = {'dashboard_port': _free_port(), 'dashboard_agent_listen_port': _free_port()}
  agent = ports['dashboard_agent_listen_port'] if dashboard else None
  with _without_agents(agent), tempfile.TemporaryDirectory(prefix='ray', dir='/tmp') as folder:
    head = {
      **_options(),
      'num_cpus': 0,
      'include_dashboard': dashboard,
      'no_monitor': True,
      'temp_dir': folder,
      **(ports if dashboard else {}),
    }
    with _as_a_user():
      cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
      made = Hosts(cluster, f'http://127.0.0.1:{ports["dashboard_port"]}' if dashboard else '')
      for _ in range(hosts):
        made.add()
      yield made
    finally:
      import ray

      ray.shutdown()
      cluster.shutdown()


def _free_port() -> int:
  with contextlib.closing(socket.create_server(('127.0.0.1', 0))) as server:
    return server.getsockname()[1]


def _options() -> dict:
  return {'object_store_memory': STORE, 'runtime_env_agent_port': _free_port()}


@contextlib.contextmanager
def _as_a_user():
  """Without the variables by which the tests give jax eight devices: raylets hand theirs to their workers."""
  kept = {name: os.environ.pop(name) for name in ('XLA_FLAGS', 'PJRT_NPROC') if name in os.environ}
  try:
    yield
  finally:
    os.environ.update(kept)


@contextlib.contextmanager
def _without_agents(port: int | None):
  """Raylets start no agent, and find its port files as an agent without a dashboard writes them: -1.

  The agent serves metrics and the dashboard, which few tests ask. To import it costs seconds a raylet, and a
  raylet aborts where it takes longer than 15 s, as it does on two busy cores.

  Args:
    port: where the agent of the first raylet, which is the head's, is to listen; None: it has none either. Its
      raylet does not wait for it.
  """
  from ray._private import services
  from ray._private.node import Node

  # Within another cluster's block too.
  start = getattr(Node.start_raylet, 'original', Node.start_raylet)
  start_process = services.start_ray_process
  agents = [port] if port else []

  def start_raylet(node, *arguments, **options):
    listen = agents.pop() if agents else -1
    for name in ('dashboard_agent_listen_port', 'metrics_agent_port', 'metrics_export_port'):
      number = listen if name == 'dashboard_agent_listen_port' else -1
      pathlib.Path(node.get_session_dir_path(), f'{name}_{node.node_id}').write_text(str(number))
    with _patched(services, 'start_ray_process', start_process if listen > 0 else without_agent):
      start(node, *arguments, **options)

  def without_agent(command, *arguments, **options):
    agent = '--dashboard_agent_command='
    command = [f'{agent}sleep 1000000' if word.startswith(agent) else word for word in command]
    return start_process(command, *arguments, **options)

  start_raylet.original = start
  with _patched(Node, 'start_raylet', start_raylet):
    yield


@contextlib.contextmanager
def _patched(owner, name: str, value):
  before = getattr(owner, name)
  setattr(owner, name, value)
  try:
    yield
  finally:
    setattr(owner, name, before)


@dataclasses.dataclass(frozen=True)
class Together(cleaning.Filter):
  """Keeps every text, and lets a process read on as soon as so many have begun to read.

  Attributes:
    folder: where each of them writes a file.
    processes: how many.
  """

  folder: str
  processes: int

  def apply(self, text: str) -> tuple[str, str]:
    begun = pathlib.Path(self.folder)
    end = time.monotonic() + 60
    while len(list(begun.iterdir())) < self.processes and time.monotonic() < end:
      (begun / str(os.getpid())).touch()
      time.sleep(0.02)
    return text, ''


def finish_group(arguments: tuple[str, ...], names: tuple[str, ...], cpus: float) -> str:
  """`group.train_group` whose training is nothing: leases and rows are what is left."""
  from research.sweeps import group
  from research.sweeps.worker import Worker

  def nothing(worker, members):
    for run, _ in members:
      worker.folder.run(run).mkdir(parents=True, exist_ok=True)
      row = '{"status": "finished", "loss": 1.0, "seconds": 0.1}'
      (worker.folder.run(run) / 'run.json').write_text(row)

  Worker.attempt = nothing
  return group.train_group(arguments, names, cpus)


def nodes_of_call(needs: dict) -> list[str]:
  """A call that takes several hosts: the node of its first, and those of the others."""
  import ray

  needs = ray_cluster.Needs(**needs)
  tasks = ray_tasks.Tasks('tests.raylets', 'hold', ray_gangs.others(needs), fresh=True)
  nodes = [ray.get_runtime_context().get_node_id()]
  ray_tasks.do_all(
    tasks,
    dict.fromkeys(range(1, needs.hosts), ()),
    ended=lambda outcome: nodes.append(outcome.node),
  )
  return nodes


def hold() -> None:
  """Takes the host for a while, so that others of the call must be elsewhere."""
  time.sleep(3)


def _command(pid: int) -> str:
  with contextlib.suppress(OSError):
    return pathlib.Path(f'/proc/{pid}/cmdline').read_text()
  return ''


def descendants(pid: int) -> list[int]:
  """The processes that a process and its children started."""
  children = []
  # Each thread has those that it started.
  for thread in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
    with contextlib.suppress(OSError):
      children += thread.read_text().split()
  return [p for child in map(int, children) for p in (child, *descendants(child))]
