"""Who does which run: leases that workers take, renew and lose, in a folder or in a bucket.

A lease is one small file beside its run, written only if nobody else wrote it meanwhile (TensorStore's
conditional write: a lock file in a folder, a generation match in gs://). It expires unless its owner renews it,
and an owner renews it only while the run gets on; so a worker that died, hangs or was cut off loses it.
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

from research.core import remote


def _host() -> str:
  """This machine since it was started, or this container: process ids mean something within it."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return f'{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ""}'


def _born(pid: int) -> str:
  """When a process was started, in the kernel's ticks: a process id alone may have been given again."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except OSError:
    return ''


def _is_dead(entry: dict) -> bool:
  """Whether the owner is known to be gone: only a process of this machine can be."""
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
    pid: the owner's process id, on `host`.
    expires: seconds since the epoch.
    failures: attempts at this run that ended in an error, or got it no further.
    reason: of the last of them.
    step: how far the run was when the lease was taken.
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
  """The lease is another worker's now."""


class Leases:
  """The leases of a sweep's runs; `<place>/<run>/lease.json`."""

  def __init__(self, place: str | pathlib.Path, seconds: float = 60.0):
    """Args:
    place: a folder or a URL.
    seconds: without renewal a lease is lost after so long; more than hosts' clocks may differ.
    """
    import tensorstore

    if remote.is_remote(place):
      spec = str(place).rstrip('/') + '/'
    else:
      pathlib.Path(place).mkdir(parents=True, exist_ok=True)
      path = f'{pathlib.Path(place).absolute()}/'
      # A lease need not survive a power cut: whoever held it did not either.
      spec = {'driver': 'file', 'path': path, 'context': {'file_io_sync': False}}
    self.store = tensorstore.KvStore.open(spec).result()
    self.seconds = seconds
    self.me = f'{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}'
    self.host, self.born = _host(), _born(os.getpid())
    self.absent = self.store.read('absent').result().stamp.generation

  def read(self, run: str) -> Entry | None:
    entry, _ = self._read(run)
    return entry and Entry(**entry)

  def _read(self, run: str) -> tuple[dict | None, bytes]:
    found = self.store.read(f'{run}/lease.json').result()
    return (json.loads(found.value) if found.state == 'value' else None), found.stamp.generation

  def take(self, run: str, step: int = 0) -> 'Held | None':
    """The lease of a run, or None while another worker has it.

    Args:
      step: how far the run is. An owner that vanished without getting further counts as a failure of the run.
    """
    held = Held(self, run, self.absent, 0, '', step)
    if held.taken():  # nobody ever had it, as is usual
      return held
    entry, held.generation = self._read(run)
    if entry:
      held.failures, held.reason = entry['failures'], entry['reason']
      if entry['owner']:
        if not (_is_dead(entry) or time.time() > entry['expires']):
          return None
        if step <= entry['step']:
          held.failures += 1
          held.reason = f'the worker {entry["owner"]} vanished or hung'
    return held if held.taken() else None


class Held:
  """A lease that this worker has."""

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
    """Raises Lost where another worker took it."""
    self._write(self._entry(self.leases.me, time.time() + self.leases.seconds))

  def taken(self) -> bool:
    """Whether this worker could write it."""
    try:
      self.renew()
    except Lost:
      return False
    return True

  def release(self) -> None:
    """Nobody has it, and nothing is held against the run. Raises Lost."""
    self._write(None)
    self.over = True

  def fail(self, reason: str) -> None:
    """Nobody has it; the failure is remembered. Raises Lost."""
    self.failures, self.reason = self.failures + 1, reason
    self._write(self._entry('', 0.0))
    self.over = True


class Heartbeat:
  """Renews leases from a thread while `progress()` changes; `lost()` is called when one is another's.

  Args:
    progress: anything that changes while the run gets on, such as the size of its metrics file.
    patience: seconds without a change (compiling, evaluating) after which this worker counts as hung.
  """

  def __init__(
    self, held: list[Held], progress: Callable, patience: float, lost: Callable[[], None]
  ):
    self.held, self.progress, self.patience, self.lost = held, progress, patience, lost
    self.stop = threading.Event()
    self.thread = threading.Thread(target=self._beat, daemon=True)

  def _beat(self) -> None:
    seen, since = self.progress(), time.monotonic()
    while not self.stop.wait(self.held[0].leases.seconds / 4):
      if (now := self.progress()) != seen:
        seen, since = now, time.monotonic()
      if time.monotonic() - since > self.patience:
        continue
      try:
        for held in self.held:
          held.renew()
      except Lost:
        return self.lost()
      except (
        Exception
      ):  # a store that cannot be reached: the lease runs out, or the next renewal comes in time
        continue

  def __enter__(self):
    self.thread.start()
    return self

  def __exit__(self, *_):
    self.stop.set()
    self.thread.join()
