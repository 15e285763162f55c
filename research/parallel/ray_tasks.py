"""Calls a function on the hosts of a Ray cluster that this process has joined.

A call names its function, and the host imports it from its own copy of the project. A host without the project,
with another version of it, or without the shared folder is an error in one sentence, before it computes
anything. Ray retries nothing here: the caller learns that a call was lost with its host, and decides, since it
knows which results are on the shared disk already.
"""

import atexit
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping

from research.core import cli, storage
from research.core.errors import UserError, in_a_line
from research.parallel import ray_gangs
from research.parallel.ray_cluster import Needs, impossible, slots_of

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# Variables of this process that its tasks get too, if they are set.
PASSED_ON = ('ISOFLOP_CACHE', 'JAX_PLATFORMS', 'TF_CPP_MIN_LOG_LEVEL')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of a call.

  Attributes:
    key: the key of `Tasks.start`.
    value: the result of the function.
    node: Ray's name of the node that answered; several nodes may be on one host.
    lost: why there is no value if the host or its process died; '' otherwise.
    error: an exception of the function; None otherwise.
  """

  key: object
  value: object = None
  node: str = ''
  lost: str = ''
  error: Exception | None = None


@functools.cache
def project_digest(root: str) -> str:
  """Returns a digest of the project's Python code; it is equal for equal copies."""
  digest = hashlib.sha256()
  for room in ('research', 'tasks'):
    for path in sorted(pathlib.Path(root, room).rglob('*.py')):
      digest.update(str(path.relative_to(root)).encode() + b'\0' + path.read_bytes())
  return digest.hexdigest()[:16]


@functools.cache
def mark_folder(folder) -> str:
  """Writes a file into a folder that every host must share; returns its path, for `Tasks`.

  Its name is random, so a host that sees it sees the same folder. This process removes it at its exit.
  """
  storage.make(folder)
  path = folder / f'.shared-{uuid.uuid4().hex}'
  storage.write_atomic(path, '')
  atexit.register(path.unlink, missing_ok=True)
  return str(path)


def sees(path: str) -> bool:
  """Returns whether this host sees the file of `mark_folder`."""
  try:
    return storage.place(path).exists()
  except (OSError, UserError):
    return False


def _entry():
  """Returns the function that Ray sends to a host: nested, so that its code is sent and not a module name."""

  def call(root, digest, folder, marks, module, name, arguments):
    import importlib
    import os
    import socket
    import sys

    ray = sys.modules.get('ray')
    node = ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ''
    host = (socket.gethostname(), node)
    if os.path.isdir(root) and root not in sys.path:
      sys.path.insert(0, root)
    if os.path.isdir(folder):
      os.chdir(folder)  # relative paths of gin files and corpora mean what they mean to the caller
    try:
      tasks = importlib.import_module('research.parallel.ray_tasks')
      function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
      return 'lacks', host, error.name or str(error)
    if tasks.project_digest(str(tasks.ROOT)) != digest:
      return 'differs', host, str(tasks.ROOT)
    for path in marks:
      if not tasks.sees(path):
        return 'unshared', host, os.path.dirname(path)
    try:
      return 'done', host, function(*arguments)
    # As text: the exception may have attributes that cannot be pickled.
    except tasks.UserError as error:
      return 'refused', host, str(error)

  return call


class Tasks:
  """Calls of one function on the hosts of the cluster that this process has joined.

  Args:
    module: the module of the function, which every host imports.
    name: the name of the function.
    needs: the resources of each call.
    shared: folders or buckets that every host must see.
    fresh: each call has a process of its own. A call that takes several hosts has one.
  """

  def __init__(
    self,
    module: str,
    name: str,
    needs: Needs,
    shared: Iterable = (),
    fresh: bool = False,
  ):

    self.needs = needs
    self.pending: dict = {}  # Ray's reference of a call -> its key
    self._settled = time.monotonic()
    self._head = (str(ROOT), project_digest(str(ROOT)), os.getcwd())
    self._function = (tuple(mark_folder(folder) for folder in shared), module, name)
    passed = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    variables = {**cli.CPU_ENVIRONMENT, **passed}
    if not needs.gpus:
      # jax starts a thread for each core of the host; a call may use only as many as it has requested.
      variables.setdefault('PJRT_NPROC', str(max(1, math.ceil(needs.cpus))))
    self._gangs = ray_gangs.Gangs(needs)
    self._remote = self._gangs.remote(_entry(), name, variables, fresh)

  def start(self, key, *arguments) -> None:
    """Queues a call."""
    place = (*self._head, *self._function, arguments)
    self.pending[self._gangs.start(self._remote, place)] = key

  def slots(self) -> int:
    """Returns how many calls the cluster can answer at once, with its present hosts."""
    return slots_of(self.needs)

  def check_possible(self, patience: float) -> None:
    """Raises UserError if no host has had the resources of a call for `patience` seconds."""
    if not self.pending or self.slots():
      self._settled = time.monotonic()
    elif time.monotonic() - self._settled > patience:
      raise UserError(impossible(self.needs))

  def ended(self, seconds: float) -> list[Outcome]:
    """Waits for at most so many seconds until a call ends; returns all that have.

    Raises:
      UserError: a host lacks the project, has another version of it, or does not share a folder.
    """
    import ray

    if not self.pending:
      time.sleep(seconds)
      return []
    first, _ = ray.wait(list(self.pending), timeout=seconds)
    if not first:
      return []
    done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
    for reference in done:
      self._gangs.end(reference)
    return [self._outcome(reference, self.pending.pop(reference)) for reference in done]

  @staticmethod
  def _outcome(reference, key) -> Outcome:
    import ray
    from ray import exceptions

    try:
      kind, (host, node), value = ray.get(reference)
    except exceptions.RayTaskError as error:
      return Outcome(key, error=error.cause if isinstance(error.cause, Exception) else error)
    except (exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as error:
      raise UserError(f'Ray cannot start a task: {" ".join(str(error).split())[:300]}') from error
    except exceptions.RayError as error:
      return Outcome(key, lost=in_a_line(error))
    if kind == 'done':
      return Outcome(key, value, node)
    if kind == 'refused':
      return Outcome(key, error=UserError(value))
    raise UserError(_refusal(kind, host, value))

  def cancel(self) -> None:
    """Ends the calls that still run, as SIGINT does, and drops them."""
    import ray

    for reference in self.pending:
      ray.cancel(reference, force=False)
      self._gangs.end(reference)
    self.pending.clear()


def _refusal(kind: str, host: str, value: str) -> str:
  if kind == 'lacks' and value.split('.')[0] in ('research', 'tasks'):
    return (
      f'host {host} has no {value}: it needs the project at {ROOT}, or installed in the Python that started '
      'its ray, in the same version.'
    )
  if kind == 'lacks':
    return (
      f'host {host} lacks the package {value}: install the same lock there (uv sync --extra ray).'
    )
  if kind == 'differs':
    return (
      f'host {host} has another version of the project, in {value}: bring it to that of this machine, or '
      'results would differ by host.'
    )
  return (
    f'host {host} does not see {value} as this machine does: choose a folder that all hosts share, or a bucket '
    '(gs://...).'
  )


def _ignore(outcome: Outcome) -> None:
  """Shows no progress."""


def do_all(
  tasks: Tasks,
  calls: Mapping[object, tuple],
  ended: Callable[[Outcome], None] = _ignore,
  retries: int = 5,
  queue: int = 256,
) -> dict:
  """Makes every call until each has a value; returns {key: value}.

  Args:
    tasks: makes the calls.
    calls: {key: arguments}.
    ended: called with each outcome, to show progress.
    retries: how often a call may be lost with its host before that is an error.
    queue: how many calls wait in Ray at once, so that its memory does not grow with their number.

  Raises:
    UserError: a call was lost too often.
    Exception: what the function raised.
  """
  waiting = list(calls)[::-1]
  values = {}
  losses = dict.fromkeys(calls, 0)
  try:
    while len(values) < len(calls):
      while waiting and len(tasks.pending) < queue:
        key = waiting.pop()
        tasks.start(key, *calls[key])
      tasks.check_possible(patience=60.0)
      for outcome in tasks.ended(0.5):
        ended(outcome)
        if outcome.error:
          raise outcome.error
        if not outcome.lost:
          values[outcome.key] = outcome.value
          continue
        losses[outcome.key] += 1
        if losses[outcome.key] > retries:
          raise UserError(f'{outcome.key}: lost {losses[outcome.key]} times ({outcome.lost}).')
        waiting.append(outcome.key)
  finally:
    tasks.cancel()
  return values
