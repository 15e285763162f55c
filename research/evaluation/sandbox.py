"""Runs programs that a model wrote: none of them may harm this machine, whatever it does.

A program is a child process in a folder of its own, which is thrown away. It has

- no network and sees no other process, where the kernel gives an unprivileged user namespaces (`unshare`);
- no environment: no keys, no home, and Python's isolated mode;
- limits on memory, processor time, processes, open files, the size of a file, and the text that it prints;
- a wall-clock limit, after which its whole process group is killed.

A program can still read what this user can read. Where namespaces are to be had, it sees the file system
read-only, but for its folder. `isolation` says what this machine gives; it is part of every result.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from research.core.errors import Invalid

MIB = 2**20
# New user, network, process, mount and IPC namespaces; the first process in there is the program's parent.
UNSHARE = (
  'unshare',
  '--user',
  '--map-root-user',
  '--net',
  '--pid',
  '--fork',
  '--kill-child',
  '--mount',
  '--ipc',
)
# In the new mount namespace everything becomes read-only, the folder excepted; then the program takes over.
READ_ONLY = (
  'mount --make-rprivate / && mount --bind "$1" "$1" && '
  'for m in $(cut -d" " -f2 /proc/self/mounts | sort -r); do '
  '[ "$m" = "$1" ] || mount -o remount,bind,ro "$m" 2>/dev/null; done; '
  'mount -t proc proc /proc 2>/dev/null; cd "$1" && shift && exec "$@"'
)  # fmt: skip
# Sets limits, which can then be lowered and not raised, and becomes the program. A function called between fork
# and exec would do the same, and jax's threads forbid it.
BECOME = """
import json, os, resource, sys
for name, value in json.loads(sys.argv[1]).items():
  kind = getattr(resource, name)
  hard = resource.getrlimit(kind)[1]
  value = value if hard == resource.RLIM_INFINITY else min(value, hard)
  resource.setrlimit(kind, (value, value))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
PYTHON = (sys.executable, '-I', '-S', '-B')  # the standard library, and nothing of this environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a program may use.

  Attributes:
    seconds: by the clock, and of processor time.
    memory: MiB of address space.
    processes: how many it may start; Linux counts threads too.
    output: KiB that it may print, both streams together.
    file: MiB of one file.
  """

  seconds: float = 5.0
  memory: int = 512
  processes: int = 16
  output: int = 64
  file: int = 16

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        raise Invalid(Limits, field.name, f'{value!r} must be above 0.')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a program ended.

  Attributes:
    code: its exit code; negative for a signal; None where it was killed for its time or its output.
    output: the end of what it printed.
    reason: '' or why it was killed.
  """

  code: int | None
  output: str
  reason: str = ''

  @property
  def passed(self) -> bool:
    return self.code == 0


@functools.cache
def isolation() -> str:
  """'namespaces', or 'limits' where this machine gives no namespaces to this user."""
  if sys.platform != 'linux' or not shutil.which('unshare'):
    return 'limits'
  with tempfile.TemporaryDirectory(prefix='isoflop-') as folder:
    probe = f'test ! -w / && touch {folder}/x && test "$(id -u)" = 0'
    command = [*UNSHARE, 'sh', '-c', READ_ONLY, 'sh', folder, 'sh', '-c', probe]
    try:
      done = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return 'limits'
  return 'namespaces' if done.returncode == 0 else 'limits'


def run_python(program: str, limits: Limits | None = None) -> Outcome:
  """Runs a Python program to its end or to a limit."""
  limits = limits or Limits()
  with tempfile.TemporaryDirectory(prefix='isoflop-', ignore_cleanup_errors=True) as folder:
    folder = os.path.realpath(folder)
    (pathlib.Path(folder) / 'program.py').write_text(program, errors='replace')
    limited = json.dumps(_resources(limits))
    command = [*PYTHON, '-c', BECOME, limited, *PYTHON[1:], 'program.py']
    if isolation() == 'namespaces':
      command = [*UNSHARE, 'sh', '-c', READ_ONLY, 'sh', folder, *command]
    process = subprocess.Popen(
      command,
      cwd=folder,
      env={'PATH': os.defpath, 'LC_ALL': 'C.UTF-8', 'HOME': folder, 'TMPDIR': folder},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      return _watch(process, limits)
    finally:
      _kill(process, folder)


def _resources(limits: Limits) -> dict[str, int]:
  """Limits by the names of `resource`. The one on processes does not hold for root: time ends them there."""
  return {
    'RLIMIT_AS': limits.memory * MIB,
    'RLIMIT_CPU': int(limits.seconds) + 1,
    'RLIMIT_FSIZE': limits.file * MIB,
    'RLIMIT_NOFILE': 64,
    'RLIMIT_CORE': 0,
    'RLIMIT_NPROC': _processes_of_user() + limits.processes,
  }


def _processes_of_user() -> int:
  """How many threads this user has: the kernel's limit is on all of them together."""
  user, count = os.getuid(), 0
  for status in pathlib.Path('/proc').glob('[0-9]*/status'):
    with contextlib.suppress(OSError, ValueError):
      fields = dict(line.split(':', 1) for line in status.read_text().splitlines() if ':' in line)
      count += int(fields['Threads']) if int(fields['Uid'].split()[0]) == user else 0
  return count


def _watch(process: subprocess.Popen, limits: Limits) -> Outcome:
  """Reads what the program prints until it ends, or is to be killed."""
  deadline, text = time.monotonic() + limits.seconds, b''
  with selectors.DefaultSelector() as selector:
    selector.register(process.stdout, selectors.EVENT_READ)
    while True:
      left = deadline - time.monotonic()
      if left <= 0:
        return Outcome(None, _end(text), f'it ran longer than {limits.seconds:g} s')
      if not selector.select(min(left, 0.2)):
        if process.poll() is not None:
          break  # a child of its own holds the pipe
        continue
      piece = os.read(process.stdout.fileno(), 65536)
      text += piece
      if len(text) > limits.output * 1024:
        return Outcome(None, _end(text), f'it printed more than {limits.output} KiB')
      if not piece:
        break
  try:
    code = process.wait(max(0.0, deadline - time.monotonic()))
  except subprocess.TimeoutExpired:
    return Outcome(None, _end(text), f'it ran longer than {limits.seconds:g} s')
  return Outcome(code, _end(text))


def _end(text: bytes) -> str:
  return text[-2000:].decode(errors='replace')


def _kill(process: subprocess.Popen, folder: str) -> None:
  """Kills all that a program started. In namespaces its processes die with the first of them."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.stdout.close()
  process.wait()
  # Without namespaces, one that left the group is known by the folder that it was started in.
  for environment in pathlib.Path('/proc').glob('[0-9]*/environ'):
    with contextlib.suppress(OSError):
      if f'HOME={folder}\0'.encode() in environment.read_bytes():
        os.kill(int(environment.parent.name), signal.SIGKILL)
