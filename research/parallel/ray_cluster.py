"""Joins a Ray cluster (extra `ray`), and counts the resources of its hosts."""

import dataclasses
import os
import socket
import warnings
from collections.abc import Mapping, Sequence

from research.core.errors import Invalid, UserError
from research.parallel.addresses import split_address

CONNECT_SECONDS = 5.0  # how long a head may take to accept a connection
OWN_FIELDS = {'CPU': 'cpus', 'GPU': 'gpus', 'memory': 'memory'}  # of Ray's names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
  """The resources of a host that a call needs.

  Attributes:
    cpus, gpus: as Ray counts them.
    resources: other resources of Ray by name, such as {'TPU': 4}.
    memory: bytes; 0 requests none.
    hosts: how many hosts a call takes at once, each with these resources.
    slice: the hosts are those of one TPU slice of this kind, such as 'v5litepod-16'; '' is any hosts.
  """

  cpus: float = 1
  gpus: float = 0
  resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
  memory: int = 0
  hosts: int = 1
  slice: str = ''

  @property
  def head(self) -> str:
    """Ray's name for the first host of a slice, which has one of this resource."""
    return f'TPU-{self.slice}-head'

  def wanted(self) -> dict[str, float]:
    """Returns every resource by the name that it has in `ray.cluster_resources`."""
    wanted = {'CPU': self.cpus, 'GPU': self.gpus, 'memory': self.memory, **self.resources}
    return {name: amount for name, amount in wanted.items() if amount}

  def slots(self, resources: Mapping[str, float]) -> int:
    """Returns how many calls fit into these resources of a host at once. A call must need some resource."""
    wanted = self.wanted()
    return int(min(resources.get(name, 0) // amount for name, amount in wanted.items()))

  def slots_on(self, hosts: Sequence[Mapping[str, float]]) -> int:
    """Returns how many calls fit into hosts with these resources at once."""
    # Host by host: half a GPU on each of two hosts is not a GPU.
    each = [self.slots(resources) for resources in hosts]
    if self.slice:
      first = [host for host, slots in zip(hosts, each, strict=True) if slots]
      return int(sum(host.get(self.head, 0) for host in first))
    calls = sum(each) // self.hosts
    # A host gives each call one place at most.
    while (fit := sum(min(slots, calls) for slots in each) // self.hosts) < calls:
      calls = fit
    return calls


def check_amounts(kind: type, cpus: float, gpus: float, resources: Mapping[str, float]) -> None:
  """Checks what a task is to take of a host.

  Args:
    kind: the class that has these fields, for the message.

  Raises:
    Invalid: an amount is none that Ray knows, or there is none at all.
  """
  for field, amount in (('cpus', cpus), ('gpus', gpus)):
    if amount < 0:
      raise Invalid(kind, field, f'{amount!r} must not be negative.')
  for name, amount in resources.items():
    if name in OWN_FIELDS:
      raise Invalid(kind, 'resources', f'{name!r} is not set here but by {OWN_FIELDS[name]!r}.')
    if not isinstance(amount, int | float) or isinstance(amount, bool) or amount <= 0:
      raise Invalid(kind, 'resources', f'{amount!r} of {name!r} must be a positive number.')
  if not (cpus or gpus or resources):
    raise Invalid(
      kind, 'cpus', '0, and nothing else that a task takes: a host would get all tasks.'
    )


def load_ray(asked_by: str):
  """Returns the module `ray`.

  Args:
    asked_by: the flag that needs it, for the message.

  Raises:
    UserError: it is not installed.
  """
  # Before the import: no usage report to Ray's makers, and no warning about GPUs that a task did not request.
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
  try:
    import ray
  except ImportError:
    raise UserError(f'{asked_by} needs Ray: uv sync --extra ray.') from None
  return ray


def connect(address: str | None, asked_by: str) -> None:
  """Joins a cluster; does nothing if this process has joined one.

  Args:
    address: HOST:PORT of the head, or 'auto'; None is $RAY_ADDRESS, else the cluster of this machine, else a
      new one of this machine alone.
    asked_by: the flag that needs Ray, for messages.

  Raises:
    UserError: the head does not answer or has another version, or this machine is not a node of the cluster.
  """
  ray = load_ray(asked_by)
  if ray.is_initialized():
    return
  address = address or os.environ.get('RAY_ADDRESS') or None
  shown = f'--address={address}' if address else asked_by
  if address and '://' in address:
    raise UserError(
      f'{shown}: give HOST:PORT of the head, on a machine of the cluster (ray start --address=HOST:PORT), or '
      'send this command to the cluster with ray job submit.'
    )
  if address and address not in ('auto', 'local'):
    _check_answers(address)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Ray warns about changes of its own defaults
      ray.init(address=address, log_to_driver=False, logging_level='ERROR')
  # Ray raises RuntimeError, ConnectionError, ValueError and AssertionError here.
  except Exception as error:
    raise UserError(_why_not_joined(shown, error, bool(address))) from error


def _check_answers(address: str) -> None:
  host, port = split_address(address, f'--address={address}')
  try:
    socket.create_connection((host, port), CONNECT_SECONDS).close()
  except OSError as error:
    why = error.strerror or str(error)
    raise UserError(
      f'--address={address}: no Ray head answers there ({why}); start one with ray start --head --port={port}, '
      'or give the address that it printed.'
    ) from None


def _why_not_joined(shown: str, error: Exception, named: bool = True) -> str:
  text = ' '.join(str(error).split())
  if 'ersion mismatch' in text:
    return (
      f'{shown}: the cluster and this machine have different versions ({_versions(str(error))}); install the '
      'same Python and the same lock on both (uv sync --extra ray).'
    )
  if 'could not find any running' in text.lower():
    return (
      f'{shown}: no Ray runs on this machine; start one with ray start --head, or give '
      '--address=HOST:PORT.'
    )
  if not named:
    return (
      f'{shown}: the cluster of this machine did not start ({text[:200]}); start one with ray start --head, or '
      'give the --address=HOST:PORT of another.'
    )
  return (
    f'{shown}: this machine could not join the cluster ({text[:200]}); it must be a node of it: '
    'ray start --address=HOST:PORT.'
  )


def _versions(text: str) -> str:
  """Returns 'Ray 2.9 and 2.60' from Ray's message, which has a line for each version of each side."""
  versions: dict[str, list[str]] = {}
  for line in text.splitlines():
    name, _, version = line.strip().partition(':')
    if name in ('Ray', 'Python') and version.strip():
      versions.setdefault(name, []).append(version.strip())
  different = [
    f'{name} {" and ".join(pair)}' for name, pair in versions.items() if len(set(pair)) > 1
  ]
  return ', '.join(different) or ' '.join(text.split())[:200]


def disconnect() -> None:
  """Leaves the cluster; a cluster that `connect` started for this machine ends."""
  import ray

  ray.shutdown()


def slots_of(needs: Needs) -> int:
  """Returns how many calls with these needs the joined cluster can answer at once."""
  import ray

  return needs.slots_on([node['Resources'] for node in ray.nodes() if node['Alive']])


def check_slots(needs: Needs) -> int:
  """Returns `slots_of`, which must be 1 or more.

  Raises:
    UserError: no host has the resources that a call needs.
  """
  count = slots_of(needs)
  if not count:
    raise UserError(impossible(needs))
  return count


def impossible(needs: Needs) -> str:
  """Returns a sentence about needs that no host of the cluster can meet."""
  import ray

  resources = ray.cluster_resources()
  wanted = ', '.join(f'{amount:g} {name}' for name, amount in needs.wanted().items())
  names = [*needs.wanted(), *([needs.head] if needs.slice else [])]
  has = ', '.join(f'{resources.get(name, 0):g} {name}' for name in names)
  alive = sum(node['Alive'] for node in ray.nodes())
  if needs.slice:
    who = f'no slice {needs.slice} of the cluster'
  elif needs.hosts > 1:
    who = f'no {needs.hosts} hosts of the cluster'
    has += f' on {alive} hosts'
  else:
    who = 'no host of the cluster'
  return (
    f'{who} can take a task of {wanted}: there are {has} in all. Add hosts (ray start --address=...), or ask '
    'for less.'
  )
