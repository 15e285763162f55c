"""Leases decide which worker trains which run. They are files in a folder or a bucket.

A lease is one small file beside its run. A write succeeds only if nobody else wrote the file meanwhile
(TensorStore's conditional write: a lock file in a folder, a generation match in gs://). A lease expires unless
its owner renews it, and the owner renews it only while the run makes progress. So a worker that died, hangs or
lost its connection loses the lease.
"""

import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

from research.core import storage


def _host() -> str:
  """A name for this machine since its last boot, or for this container. Process ids are unique within it."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return f'{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ""}'


def _born(pid: int) -> str:
  """The start time of a process in kernel ticks. A process id alone may have been reused since."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return ''


def _is_dead(entry: dict) -> bool:
  """Whether the owner is certainly dead. Of a process on another machine nobody can say."""
  if entry['host'] != _host():
    return False
  try:
    os.kill(entry['pid'], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return _born(entry['pid']) != entry['born']


@dataclasses.dataclass(frozen=True)
class Entry:
  """The content of a lease file.

  Attributes:
    owner: a worker; '' when nobody has the run.
    host, pid, born: the machine, the process id and the start time of the owner.
    expires: seconds since the epoch.
    failures: attempts at this run that raised an error or made no progress.
    reason: why the last of them failed.
    step: the newest checkpoint of the run when the lease was taken.
  """

  owner: str
  host: str
  pid: int
  expires: float
  failures: int
  reason: str
  step: int
  born: str

  @property
  def expired(self) -> bool:
    return time.time() > self.expires


class Lost(Exception):
  """Another worker has taken the lease."""


class Leases:
  """The leases of a sweep's runs, files `<place>/<run>/lease.json`.

  Args:
    place: a folder or a URL.
    seconds: how long a lease lasts without renewal. It must be much longer than the clocks of hosts differ.
  """

  def __init__(self, place: str | pathlib.Path, seconds: float = 60.0):
    self.store = storage.key_value_store(storage.place(place))
    self.seconds = seconds
    self.me = f'{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}'
    self.host = _host()
    self.born = _born(os.getpid())
    self.absent = self.store.read('absent').result().stamp.generation

  def read(self, run: str) -> Entry | None:
    """The lease file of a run; None where there is none."""
    entry, _ = self._read(run)
    return entry and Entry(**entry)

  def _read(self, run: str) -> tuple[dict | None, bytes]:
    answer = self.store.read(f'{run}/lease.json').result()
    return (json.loads(answer.value) if answer.state == 'value' else None), answer.stamp.generation

  def take(self, run: str, step: int = 0) -> 'Lease | None':
    """The lease of a run, or None while another worker has it.

    Args:
      step: the newest checkpoint of the run. If the last owner vanished without a newer one, that counts as a
        failure of the run.
    """
    lease = Lease(self, run, self.absent, 0, '', step)
    if lease.try_renew():  # nobody had it before: the usual case, and a single request
      return lease
    entry, lease.generation = self._read(run)
    if entry:
      lease.failures = entry['failures']
      lease.reason = entry['reason']
      if entry['owner']:
        if not (_is_dead(entry) or time.time() > entry['expires']):
          return None
        if step <= entry['step']:
          lease.failures += 1
          lease.reason = f'the worker {entry["owner"]} vanished or hung'
    return lease if lease.try_renew() else None


class Lease:
  """This worker's lease of one run, unless another worker took it meanwhile.

  Attributes:
    failures, reason: of the run so far, as in `Entry`.
    over: whether this worker gave the lease up.
  """

  def __init__(self, leases: Leases, run: str, generation, failures: int, reason: str, step: int):
    self.leases = leases
    self.run = run
    self.generation = generation
    self.failures = failures
    self.reason = reason
    self.step = step
    self.over = False

  def _write(self, value: bytes | None) -> None:
    key = f'{self.run}/lease.json'
    stamp = self.leases.store.write(key, value, if_equal=self.generation).result()
    if not stamp.generation:  # the condition failed, so nothing was written
      raise Lost(self.run)
    self.generation = stamp.generation

  def _entry(self, owner: str, expires: float) -> bytes:
    leases = self.leases
    entry = Entry(
      owner, leases.host, os.getpid(), expires, self.failures, self.reason, self.step, leases.born
    )
    return json.dumps(dataclasses.asdict(entry)).encode()

  def renew(self) -> None:
    """Extends the lease to `Leases.seconds` from now.

    Raises:
      Lost: another worker took it.
    """
    self._write(self._entry(self.leases.me, time.time() + self.leases.seconds))

  def try_renew(self) -> bool:
    """Renews the lease; False where another worker has it."""
    try:
      self.renew()
    except Lost:
      return False
    return True

  def release(self) -> None:
    """Deletes the lease and the count of failures in it.

    Raises:
      Lost: another worker took it.
    """
    self._write(None)
    self.over = True

  def fail(self, reason: str) -> None:
    """Gives the lease up and counts a failure of the run.

    Raises:
      Lost: another worker took it.
    """
    self.failures += 1
    self.reason = reason
    self._write(self._entry('', 0.0))
    self.over = True


class Heartbeat:
  """A thread that renews leases while their runs make progress.

  Args:
    leases: of the runs that this worker trains.
    progress: returns a value that changes while the runs make progress, such as the sizes of metrics files.
    patience: seconds without a change after which this worker counts as hung and stops renewing.
    lost: called when another worker has taken a lease.
  """

  def __init__(
    self, leases: list[Lease], progress: Callable, patience: float, lost: Callable[[], None]
  ):
    self.leases = leases
    self.progress = progress
    self.patience = patience
    self.lost = lost
    self.stop = threading.Event()
    self.thread = threading.Thread(target=self._beat, daemon=True)

  def _beat(self) -> None:
    last = self.progress()
    last_change = time.monotonic()
    # Four times within its duration, so that a lease survives renewals that fail.
    while not self.stop.wait(self.leases[0].leases.seconds / 4):
      if (current := self.progress()) != last:
        last = current
        last_change = time.monotonic()
      if time.monotonic() - last_change > self.patience:
        continue
      try:
        for lease in self.leases:
          lease.renew()
      except Lost:
        return self.lost()
      except Exception:
        # The store cannot be reached. Either the next renewal succeeds in time, or the lease expires.
        continue

  def __enter__(self):
    self.thread.start()
    return self

  def __exit__(self, *_):
    self.stop.set()
    self.thread.join()
