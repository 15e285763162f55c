"""Assigns the runs of a sweep in groups, for launchers that send runs to hosts.

A worker that chooses its runs itself reads the lease of each. Here a single process knows what it assigned, so
that ten thousand runs cost it no more than their rows. The leases still decide: other workers may share the
folder, and a group that was assigned twice is trained once.
"""

import collections
import math
import operator
import time

from research.designs.plan import Planned
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep
from research.sweeps.worker import Worker

# Seconds until a run is assigned again that another worker had, or that was not ready.
PAUSE = 2.0


class Dispatch:
  """The runs of a sweep that are still to be assigned.

  Args:
    runs: of the sweep. Those that have a row are over, and do not take part.

  Attributes:
    population: the most runs of a group; at first the sweep's.
  """

  def __init__(self, sweep: Sweep, folder: Folder, runs: list[Planned]):
    self.sweep = sweep
    self.folder = folder
    self.population = sweep.population
    self.asks = Worker(sweep, folder)  # whether a run can start; it takes no lease
    waiting = [run for run in runs if folder.row(run) is None]
    # The most expensive first, as a worker does, so that all hosts end at about the same time.
    by_cost = sorted(waiting, key=operator.attrgetter('cost'), reverse=True)
    self.waiting = {run.name: run for run in by_cost}
    self.given: dict[str, Planned] = {}
    self.not_before: dict[str, float] = {}
    self.left = sum(run.cost for run in waiting)  # FLOPs of the runs that have no row

  def __len__(self) -> int:
    """How many runs are not over, as far as this process knows."""
    return len(self.waiting) + len(self.given)

  def groups(self, slots: int, most: int) -> list[tuple[str, ...]]:
    """The next groups to train, at most `most`, each the names of runs that may form one population.

    Args:
      slots: how many groups can be trained at once. Towards the end of a sweep the groups become smaller, so
        that no slot is without work.
    """
    now = time.monotonic()
    groups: list[tuple[str, ...]] = []
    if most < 1:
      return groups
    free: dict[tuple, list[Planned]] = collections.defaultdict(list)
    for run in self.waiting.values():
      # More shapes than groups to fill: the rest waits for the next call.
      if len(free) > most and Worker.kind(run) not in free:
        continue
      if self.not_before.get(run.name, 0.0) > now:
        continue
      if run.parent and not self.asks.ready(run):
        self.not_before[run.name] = now + PAUSE
        continue
      key = (*Worker.kind(run), run.name if run.parent else '')
      free[key].append(run)
    for alike in free.values():
      size = self._size(alike, slots)
      for start in range(0, len(alike), size):
        if len(groups) == most:
          break
        group = alike[start : start + size]
        groups.append(tuple(run.name for run in group))
        for run in group:
          self.given[run.name] = self.waiting.pop(run.name)
    return groups

  def _size(self, alike: list[Planned], slots: int) -> int:
    """Members of a group: a whole population, unless other slots would then run out of work."""
    population = self.population
    whole = min(population, len(alike))
    if slots * whole * alike[0].cost <= self.left:
      return whole
    return min(population, max(1, math.ceil(len(alike) / max(slots, 1))))

  def ended(self, names: tuple[str, ...]) -> int:
    """Takes back a group whose training ended, however it did; returns how many of its runs are over."""
    over = 0
    for name in names:
      run = self.given.pop(name)
      if self.folder.row(run):
        over += 1
        self.left -= run.cost
        self.not_before.pop(name, None)
      else:
        self.waiting[name] = run
        self.not_before[name] = time.monotonic() + PAUSE
    return over
