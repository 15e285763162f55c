"""Simulates a sweep on a fleet whose hosts may be preempted, to estimate how long it takes."""

import dataclasses
import heapq
import random
import statistics
from collections.abc import Sequence

from research.core.errors import UserError
from research.core.text import clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
  """Hosts that train one run at a time each.

  Attributes:
    hosts: how many at a time.
    preemptions: how often an hour a host is taken away without a warning; another takes its place.
    lease: seconds until the run of a lost host may be taken by another one.
    start: seconds from a host's taking a run to the first step: the process, compilation, the checkpoint.
    replace: seconds until the place of a lost host is filled.
  """

  hosts: int
  preemptions: float = 0.0
  lease: float = 60.0
  start: float = 30.0
  replace: float = 120.0

  def __post_init__(self):
    if self.hosts < 1:
      raise UserError(f'--fleet={self.hosts}: a fleet has at least one host.')
    if not 0 <= self.preemptions < 3600:
      raise UserError(
        f'--preemptions={self.preemptions:g}: how often an hour a host is taken away, 0 or more.'
      )


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to be done.

  Attributes:
    seconds: of training on one host.
    saved_every: seconds of training between two checkpoints.
  """

  seconds: float
  saved_every: float


@dataclasses.dataclass(frozen=True)
class Simulated:
  """What one simulation gave.

  Attributes:
    seconds: until the last run was over.
    preempted: hosts that were taken away while they trained.
    lost: seconds of training that had to be done again.
    trained: seconds of training of the runs that were finished.
    failed: runs that were given up, because they were lost too often before they saved.
  """

  seconds: float
  preempted: int
  lost: float
  trained: float
  failed: int


def simulate(jobs: Sequence[Job], fleet: Fleet, retries: int, seed: int) -> Simulated:
  """Does the runs as a sweep does: the longest first, each until it ends or its host is lost.

  Args:
    retries: `Sweep.retries`: a loss without a new checkpoint counts as a failure of the run.
    seed: of the times at which hosts are lost, which are exponential.
  """
  chance = random.Random(seed)
  rate = fleet.preemptions / 3600
  remaining = [job.seconds for job in jobs]
  failures = [0] * len(jobs)
  ready = [(-seconds, i) for i, seconds in enumerate(remaining)]
  heapq.heapify(ready)
  waiting: list[tuple[float, int]] = []  # (when its lease expires, run)
  free = [0.0] * fleet.hosts  # when each host can take a run
  end, lost, trained = 0.0, 0.0, 0.0
  preempted = failed = 0
  while ready or waiting:
    time = heapq.heappop(free)
    # No run is free: the host waits until the lease of a lost host expires.
    if not ready and waiting[0][0] > time:
      heapq.heappush(free, waiting[0][0])
      continue
    while waiting and waiting[0][0] <= time:
      _, i = heapq.heappop(waiting)
      heapq.heappush(ready, (-remaining[i], i))
    # The longest first, as workers take them.
    _, i = heapq.heappop(ready)
    needs = fleet.start + remaining[i]
    # Preemptions are a Poisson process, so that a host does not age.
    alive = chance.expovariate(rate) if rate else float('inf')
    if alive >= needs:
      trained += jobs[i].seconds
      end = max(end, time + needs)
      heapq.heappush(free, time + needs)
      continue
    done = max(0.0, alive - fleet.start)
    saved = done - done % jobs[i].saved_every
    remaining[i] -= saved
    lost += done - saved
    preempted += 1
    heapq.heappush(free, time + alive + fleet.replace)
    failures[i] += not saved
    if failures[i] > retries:
      failed += 1
      end = max(end, time + alive)
    else:
      heapq.heappush(waiting, (time + alive + fleet.lease, i))
  return Simulated(end, preempted, lost, trained, failed)


def forecast(jobs: Sequence[Job], fleet: Fleet, retries: int, draws: int = 21) -> str:
  """A sentence or two: how long, with the range of the simulations, and what preemption costs."""
  drawn = [simulate(jobs, fleet, retries, seed) for seed in range(draws)]
  seconds = sorted(simulated.seconds for simulated in drawn)
  tenth = draws // 10
  total = sum(job.seconds for job in jobs)
  text = f'on {fleet.hosts} hosts: {clock(statistics.median(seconds))}'
  if fleet.preemptions:
    lost = statistics.mean(simulated.lost for simulated in drawn) / total
    count = statistics.mean(simulated.preempted for simulated in drawn)
    text += (
      f' (in 8 of 10 simulations {clock(seconds[tenth])} to {clock(seconds[-1 - tenth])}); each is '
      f'taken away {fleet.preemptions:g} times an hour: {count:.1f} hosts in all, and {lost:.1%} '
      'of training is done again'
    )
  busy = statistics.mean(s.trained / (fleet.hosts * s.seconds) for s in drawn)
  text += f"; {busy:.0%} of the hosts' time is training"
  failed = statistics.mean(simulated.failed for simulated in drawn)
  if failed:
    text += (
      f'\n{failed:.1f} of {len(jobs)} runs would fail, lost {retries + 1} times before they saved: raise '
      'Sweep.retries, or lower Run.checkpoint_every'
    )
  return text
