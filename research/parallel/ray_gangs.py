"""Calls that take several hosts of a Ray cluster at once: all of them, or none.

Ray calls a function on the first of these hosts. That function calls others on the rest (`others`), within what
was reserved. Where the first is lost, Ray ends the others.
"""

import dataclasses
import socket

from research.core.errors import UserError
from research.parallel.ray_cluster import Needs


class Gangs:
  """Reserves the hosts of calls with the same needs, and frees them.

  Any hosts are a placement group with a bundle for each of them. The hosts of a TPU slice need none: only one
  call has the slice's first host, and the others are known by the name of the slice.
  """

  def __init__(self, needs: Needs):
    self.needs = needs
    self._options: dict = {}
    self._groups: dict = {}  # of a call that has not ended

  def remote(self, function, name: str, variables: dict[str, str], fresh: bool):
    """Returns the function as one that Ray calls with these needs, for `start`.

    Args:
      name: of the calls, in Ray's tables.
      variables: of the environment.
      fresh: each call has a process of its own.
    """
    import ray

    needs = self.needs
    alone = {'max_calls': 1} if fresh or needs.hosts > 1 else {}
    head = {needs.head: 1} if needs.slice else {}
    self._options = {
      'num_cpus': needs.cpus,
      'num_gpus': needs.gpus,
      'resources': {**needs.resources, **head},
      'memory': needs.memory or None,
      'max_retries': 0,
      'name': name,
      'runtime_env': {'env_vars': variables},
    }
    return ray.remote(**alone, **self._options)(function)

  def start(self, remote, arguments: tuple):
    """Queues a call; returns Ray's reference of it."""
    if self.needs.hosts == 1 or self.needs.slice:
      return remote.remote(*arguments)
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([self.needs.wanted()] * self.needs.hosts, strategy='STRICT_SPREAD')
    first = PlacementGroupSchedulingStrategy(
      group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    reference = remote.options(scheduling_strategy=first).remote(*arguments)
    self._groups[reference] = group
    return reference

  def end(self, reference) -> None:
    """Frees the hosts of a call that has ended; what still runs in its name there is killed."""
    group = self._groups.pop(reference, None)
    if group is not None:
      from ray.util.placement_group import remove_placement_group

      remove_placement_group(group)


def others(needs: Needs) -> Needs:
  """Returns the needs of each call on the other hosts, within a call with `needs`.

  Raises:
    UserError: the call is to have a TPU slice, and this host is of none.
  """
  resources = dict(needs.resources)
  if needs.slice:
    from ray.util.tpu import get_current_pod_name

    name = get_current_pod_name()
    if not name:
      raise UserError(
        f'host {socket.gethostname()} has {needs.head} and no name of its slice: start its ray with TPU_NAME '
        'set, and with one of the resource of that name.'
      )
    resources[name] = 1
  return dataclasses.replace(needs, resources=resources, hosts=1, slice='')
