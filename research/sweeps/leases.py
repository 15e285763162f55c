"""Which worker does which run: leases that workers take, renew and lose, in a folder or in a bucket.

A lease is one small file beside its run. It is written only if nobody else wrote it meanwhile (TensorStore's
conditional write: a lock file in a folder, a generation match in gs://). It expires unless its owner renews it,
and an owner renews it only while the run makes progress; so a worker that died, hangs or was cut off loses it.
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
  """A name for this machine since it was started, or for this container: process ids are unique within it."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return f'{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ""}'


def _born(pid: int) -> str:
  """When a process was started, in the kernel's ticks. Its id alone may be another process's by now."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return ''


def _is_dead(entry: dict) -> bool:
  """Whether the owner is known to be gone; of a process on another machine that is never known."""
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
  """What a lease file says.

  Attributes:
    owner: a worker, '' when nobody has the run.
    host, pid, born: the owner's machine, its process id there, and when that process was started.
    expires: seconds since the epoch.
    failures: attempts at this run that ended in an error, or made no progress.
    reason: why the last of them failed.
    step: the run's newest checkpoint when the lease was taken.
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
  """The lease is another worker's by now."""


class Leases:
  """The leases of a sweep's runs, files `<place>/<run>/lease.json`.

  Args:
    place: a folder or a URL.
    seconds: how long a lease lasts without renewal; far more than the clocks of the hosts differ.
  """

  def __init__(self, place: str | pathlib.Path, seconds: float = 60.0):
    self.store = storage.key_value_store(storage.place(place))
    self.seconds = seconds
    self.me = f'{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}'
    self.host, self.born = _host(), _born(os.getpid())
    self.absent = self.store.read('absent').result().stamp.generation

  def read(self, run: str) -> Entry | None:
    """What the lease file of a run says; None where there is none."""
    entry, _ = self._read(run)
    return entry and Entry(**entry)

  def _read(self, run: str) -> tuple[dict | None, bytes]:
    answer = self.store.read(f'{run}/lease.json').result()
    return (json.loads(answer.value) if answer.state == 'value' else None), answer.stamp.generation

  def take(self, run: str, step: int = 0) -> 'Lease | None':
    """The lease of a run, or None while another worker has it.

    Args:
      step: the run's newest checkpoint. If the last owner vanished at that same step, the run failed once more.
    """
    lease = Lease(self, run, self.absent, 0, '', step)
    if lease.try_renew():  # nobody ever had it, which is the usual case
      return lease
    entry, lease.generation = self._read(run)
    if entry:
      lease.failures, lease.reason = entry['failures'], entry['reason']
      if entry['owner']:
        if not (_is_dead(entry) or time.time() > entry['expires']):
          return None
        if step <= entry['step']:
          lease.failures += 1
          lease.reason = f'the worker {entry["owner"]} vanished or hung'
    return lease if lease.try_renew() else None


class Lease:
  """The lease of one run, which this worker has unless another took it.

  Attributes:
    failures, reason: of the run so far, as in `Entry`.
    over: whether this worker gave it up.
  """

  def __init__(self, leases: Leases, run: str, generation, failures: int, reason: str, step: int):
    self.leases, self.run, self.generation = leases, run, generation
    self.failures, self.reason, self.step = failures, reason, step
    self.over = False

  def _write(self, value: bytes | None) -> None:
    key = f'{self.run}/lease.json'
    done = self.leases.store.write(key, value, if_equal=self.generation).result()
    if not done.generation:
      raise Lost(self.run)
    self.generation = done.generation

  def _entry(self, owner: str, expires: float) -> bytes:
    leases = self.leases
    entry = Entry(
      owner, leases.host, os.getpid(), expires, self.failures, self.reason, self.step, leases.born
    )
    return json.dumps(dataclasses.asdict(entry)).encode()

  def renew(self) -> None:
    """Lets the lease last for another `Leases.seconds`.

    Raises:
      Lost: another worker took it.
    """
    self._write(self._entry(self.leases.me, time.time() + self.leases.seconds))

  def try_renew(self) -> bool:
    """Renews the lease; False where it is another worker's."""
    try:
      self.renew()
    except Lost:
      return False
    return True

  def release(self) -> None:
    """Deletes the lease, and with it the run's count of failures.

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
    self.failures, self.reason = self.failures + 1, reason
    self._write(self._entry('', 0.0))
    self.over = True


class Heartbeat:
  """Renews leases from a thread while their runs make progress.

  Args:
    leases: of the runs that this worker trains.
    progress: returns something that changes while the runs make progress, such as sizes of metrics files.
    patience: seconds without a change after which this worker counts as hung, and renews no more.
    lost: called when a lease is another worker's.
  """

  def __init__(
    self, leases: list[Lease], progress: Callable, patience: float, lost: Callable[[], None]
  ):
    self.leases, self.progress, self.patience, self.lost = leases, progress, patience, lost
    self.stop = threading.Event()
    self.thread = threading.Thread(target=self._beat, daemon=True)

  def _beat(self) -> None:
    seen, since = self.progress(), time.monotonic()
    while not self.stop.wait(self.leases[0].leases.seconds / 4):
      if (now := self.progress()) != seen:
        seen, since = now, time.monotonic()
      if time.monotonic() - since > self.patience:
        continue
      try:
        for lease in self.leases:
          lease.renew()
      except Lost:
        return self.lost()
      # A store that cannot be reached: either the next renewal comes in time, or the lease expires.
      except Exception:
        continue

  def __enter__(self):
    self.thread.start()
    return self

  def __exit__(self, *_):
    self.stop.set()
    self.thread.join()
