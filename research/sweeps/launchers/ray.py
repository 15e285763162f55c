"""Runs of a sweep as tasks of a Ray cluster (extra `ray`)."""

import collections
import dataclasses
import time
import uuid
from typing import ClassVar

from research.core import storage
from research.core.errors import Invalid, UserError
from research.parallel import ray_cluster, ray_tasks
from research.sweeps.launchers.job import Job

# Tasks that wait in Ray beyond those that the cluster can run, so that its autoscaler sees that it is short.
QUEUE = 64
# Seconds that the hosts of a run may end after each other.
GRACE = 60.0
# A task that ends before it takes a lease three times in a row would do so for ever.
MOST_EARLY_ENDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ray:
  """One task a run, or a population, on the hosts of a Ray cluster that share the workdir.

  A task takes the leases of its runs as any worker does. So the sweep may have local workers beside, and
  another launcher can go on where this one stopped. A task that dies with its host is given out again; its run
  continues from its last checkpoint as soon as the lease of the dead host has expired.

  Attributes:
    address: HOST:PORT of the cluster's head; None is $RAY_ADDRESS, else the cluster of this machine, else a new
      one of this machine alone.
    cpus, gpus: what a task takes of a host.
    resources: more of Ray's resources that a task takes, such as {'TPU': 4}.
    memory: bytes that a task takes; 0 asks for none.
    hosts: of a run. Several train it as one job, each as one process; none of them trains anything else.
    patience: seconds without any host that has what a task takes, after which that is an error. Give an
      autoscaler the time to start one.
  """

  address: str | None = None
  cpus: float = 1.0
  gpus: float = 0.0
  resources: dict = dataclasses.field(default_factory=dict)
  memory: int = 0
  hosts: int = 1
  patience: float = 600.0

  FUNCTION: ClassVar[tuple[str, str]] = ('research.sweeps.group', 'train_group')
  ON_HOSTS: ClassVar[tuple[str, str]] = ('research.sweeps.group', 'train_on_hosts')

  def __post_init__(self):
    for field in ('cpus', 'gpus', 'memory'):
      if getattr(self, field) < 0:
        raise Invalid(Ray, field, f'{getattr(self, field)!r} must not be negative.')
    if self.hosts < 1:
      raise Invalid(Ray, 'hosts', f'{self.hosts!r} must be positive.')
    if not (self.cpus or self.gpus or self.resources):
      raise Invalid(
        Ray, 'cpus', '0, and nothing else that a task takes: a host would get all tasks.'
      )

  def slots(self) -> int:
    """How many runs the cluster can train at once, as it is now.

    Raises:
      UserError: the cluster cannot be joined, or none of its hosts has what a task takes.
    """
    ray_cluster.connect(self.address, '--launcher=ray')
    try:
      return max(1, ray_cluster.check_slots(self._needs()) // self.hosts)
    finally:
      ray_cluster.disconnect()

  def _needs(self) -> ray_cluster.Needs:
    return ray_cluster.Needs(
      cpus=self.cpus, gpus=self.gpus, resources=self.resources, memory=self.memory
    )

  def run(self, job: Job) -> bool:
    """Gives the runs to the cluster until all are over.

    Raises:
      UserError: the cluster cannot be joined, or its hosts cannot do these runs.
    """
    ray_cluster.connect(self.address, '--launcher=ray')
    try:
      function = self.FUNCTION if self.hosts == 1 else self.ON_HOSTS
      folders = [job.workdir / 'workers']
      tasks = ray_tasks.Tasks(*function, self._needs(), folders, fresh=self.hosts > 1)
      try:
        _GivesOut(self, job, tasks).until_all_are_over()
      finally:
        tasks.cancel()
    finally:
      ray_cluster.disconnect()
    return True


@dataclasses.dataclass
class _Given:
  """A group of runs that hosts train.

  Attributes:
    calls: that have not ended, one a host.
    placement: keeps its hosts together; None where it has one.
    deadline: when calls are ended whose neighbour ended, by `time.monotonic`.
  """

  calls: set
  placement: object = None
  deadline: float = float('inf')


class _GivesOut:
  """Gives the groups of runs of a job to a cluster, and takes back those that did not get done."""

  def __init__(self, launcher: Ray, job: Job, tasks: ray_tasks.Tasks):
    self.launcher = launcher
    self.job = job
    self.tasks = tasks
    self.dispatch = job.dispatch()
    self.given: dict[tuple[str, ...], _Given] = {}
    self.log = job.logs / 'ray.log'
    self.early = collections.Counter()  # errors by text, since a run was last over

  def until_all_are_over(self) -> None:
    slots, next_look = self.slots(), 0.0
    while len(self.dispatch):
      # Not for each task that ends: it looks at every run that waits.
      if len(self.given) < slots + QUEUE // 2:
        for names in self.dispatch.groups(slots, slots + QUEUE - len(self.given)):
          self.start(names)
      for outcome in self.tasks.ended(0.5):
        self.ended(outcome)
      if time.monotonic() > next_look:
        began = time.monotonic()
        self.job.watch()
        slots = self.slots()
        self.tasks.check_possible(self.launcher.patience)
        self.end_the_abandoned()
        # The table of ten thousand runs takes a while; it is to take a tenth of this process at most.
        next_look = time.monotonic() + max(0.5, 10 * (time.monotonic() - began))

  def slots(self) -> int:
    """How many groups the cluster can train at once."""
    return self.tasks.slots() // self.launcher.hosts

  def start(self, names: tuple[str, ...]) -> None:
    hosts, arguments = self.launcher.hosts, self.job.arguments
    if hosts == 1:
      self.given[names] = _Given({0})
      self.tasks.start((names, 0), arguments, names, self.launcher.cpus)
      return
    placement, options = ray_cluster.hosts_together(self.tasks.needs, hosts)
    self.given[names] = _Given({*range(hosts)}, placement)
    meeting = uuid.uuid4().hex
    for rank in range(hosts):
      call = (arguments, names[0], meeting, hosts, rank)
      self.tasks.start((names, rank), *call, **options[rank])

  def ended(self, outcome: ray_tasks.Outcome) -> None:
    """Takes note of one call, and with the last of a group takes the group back."""
    names, rank = outcome.key
    if isinstance(outcome.error, UserError):
      raise outcome.error
    why = outcome.lost or (outcome.error and f'{type(outcome.error).__name__}: {outcome.error}')
    if why:
      storage.append(self.log, f'{names[0]}, host {rank}: {why}\n')
    group = self.given[names]
    group.calls.discard(rank)
    group.deadline = min(group.deadline, time.monotonic() + GRACE)
    over = 0
    if not group.calls:
      over = self.dispatch.ended(names)
      ray_cluster.part(self.given.pop(names).placement)
    if over:
      self.early.clear()
    if outcome.error:
      self.early[why] += 1
      if self.early[why] > MOST_EARLY_ENDS * self.launcher.hosts:
        first = why.splitlines()[0]
        raise UserError(f'tasks end before they train: {first} (see {self.log}).')

  def end_the_abandoned(self) -> None:
    """Ends the calls of hosts that wait for one that is lost: they would wait for ever."""
    for names, group in self.given.items():
      if time.monotonic() > group.deadline:
        self.tasks.kill([(names, rank) for rank in group.calls])
