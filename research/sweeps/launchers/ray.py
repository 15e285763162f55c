"""Runs of a sweep as tasks of a Ray cluster (extra `ray`)."""

import collections
import dataclasses
import time
from typing import ClassVar

from research.core import storage
from research.core.errors import Invalid, UserError, first_line
from research.parallel import ray_cluster, ray_tasks
from research.sweeps.launchers.job import Job

# Tasks that wait in Ray beyond those that the cluster can run, so that its autoscaler sees that it is short.
QUEUE = 64
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
    hosts: how many hosts a run takes, each with all of the above. One process runs on each, and they are
      one job of jax, so a mesh may span them. Such a run is never a member of a population.
    slice: with `hosts`, the hosts are those of one TPU slice of this kind, such as 'v5litepod-16', whose first
      host has Ray's resource TPU-v5litepod-16-head.
    patience: seconds without any host that has what a task takes, after which that is an error. Give an
      autoscaler the time to start one.
  """

  address: str | None = None
  cpus: float = 1.0
  gpus: float = 0.0
  resources: dict = dataclasses.field(default_factory=dict)
  memory: int = 0
  hosts: int = 1
  slice: str = ''
  patience: float = 600.0

  FUNCTION: ClassVar[tuple[str, str]] = ('research.sweeps.group', 'train_group')
  JOINT: ClassVar[tuple[str, str]] = ('research.sweeps.joint', 'train_first')

  def __post_init__(self):
    ray_cluster.check_amounts(Ray, self.cpus, self.gpus, self.resources)
    if self.memory < 0:
      raise Invalid(Ray, 'memory', f'{self.memory!r} must not be negative.')
    if not isinstance(self.hosts, int) or self.hosts < 1:
      raise Invalid(Ray, 'hosts', f'{self.hosts!r} must be a positive whole number.')
    if self.slice and self.hosts == 1:
      why = f'{self.slice!r} goes with the number of its hosts: set Ray.hosts, or for one host Ray.resources.'
      raise Invalid(Ray, 'slice', why)

  def slots(self) -> int:
    """How many runs the cluster can train at once, as it is now.

    Raises:
      UserError: the cluster cannot be joined, or none of its hosts has what a task takes.
    """
    ray_cluster.connect(self.address, '--launcher=ray')
    try:
      return ray_cluster.check_slots(self._needs())
    finally:
      ray_cluster.disconnect()

  def _needs(self) -> ray_cluster.Needs:
    return ray_cluster.Needs(
      cpus=self.cpus, gpus=self.gpus, resources=self.resources, memory=self.memory, hosts=self.hosts,
      slice=self.slice,
    )  # fmt: skip

  def run(self, job: Job) -> bool:
    """Gives the runs to the cluster until all are over.

    Raises:
      UserError: the cluster cannot be joined, or its hosts cannot do these runs.
    """
    ray_cluster.connect(self.address, '--launcher=ray')
    try:
      folders = [job.workdir / 'workers']
      function = self.FUNCTION if self.hosts == 1 else self.JOINT
      tasks = ray_tasks.Tasks(*function, self._needs(), folders)
      try:
        self._give_out(job, tasks)
      finally:
        tasks.cancel()
    finally:
      ray_cluster.disconnect()
    return True

  def _give_out(self, job: Job, tasks: ray_tasks.Tasks) -> None:
    dispatch = job.dispatch()
    more = ()  # arguments of a task
    if self.hosts > 1:
      dispatch.population = 1
      more = (dataclasses.asdict(self._needs()),)
    errors = collections.Counter()  # of tasks by text, since a run was last over
    log = job.logs / 'ray.log'
    slots, next_look = tasks.slots(), 0.0
    while len(dispatch):
      # Not for each task that ends: it looks at every run that waits.
      if len(tasks.pending) < slots + QUEUE // 2:
        for names in dispatch.groups(slots, slots + QUEUE - len(tasks.pending)):
          tasks.start(names, job.arguments, names, self.cpus, *more)
      for outcome in tasks.ended(0.5):
        over = dispatch.ended(outcome.key)
        if isinstance(outcome.error, UserError):
          raise outcome.error
        why = outcome.lost or (outcome.error and f'{type(outcome.error).__name__}: {outcome.error}')
        if why:
          storage.append(log, f'{outcome.key[0]}: {why}\n')
        if over:
          errors.clear()
        if outcome.error:
          errors[why] += 1
          if errors[why] > MOST_EARLY_ENDS:
            raise UserError(f'tasks end before they train: {first_line(why)} (see {log}).')
      if time.monotonic() > next_look:
        began = time.monotonic()
        job.watch()
        slots = tasks.slots()
        tasks.check_possible(self.patience)
        # The table of ten thousand runs takes a while; it is to take a tenth of this process at most.
        next_look = time.monotonic() + max(0.5, 10 * (time.monotonic() - began))
