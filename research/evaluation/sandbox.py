"""Runs programs that a model wrote, so that a hostile one does not harm this machine.

A program is a child process in a new folder, which is removed afterwards. It has

- no network, no view of other processes and a read-only file system (except its folder), where the kernel gives
  namespaces to an unprivileged user (`unshare`);
- an empty environment, without keys or a home, and Python's isolated mode;
- limits on memory, processor time, processes, open files, the size of a file, and the text that it prints;
- a wall-clock limit, after which its whole process group is killed.

A program can still read every file that this user can read. `isolation` says whether this machine gives
namespaces; it is part of every result.
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
# New user, network, process, mount and IPC namespaces. When `unshare`, the program's parent there, is killed,
# the kernel kills every process of the namespace.
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
# Makes everything read-only in the new mount namespace, except the folder. Then it becomes the program.
READ_ONLY = (
  'mount --make-rprivate / && mount --bind "$1" "$1" && '
  'for m in $(cut -d" " -f2 /proc/self/mounts | sort -r); do '
  '[ "$m" = "$1" ] || mount -o remount,bind,ro "$m" 2>/dev/null; done; '
  'mount -t proc proc /proc 2>/dev/null; cd "$1" && shift && exec "$@"'
)  # fmt: skip
# Sets the limits, which the program cannot raise again, and becomes the program. It is a program of its own,
# because a function between fork and exec (`preexec_fn`) is not safe in a process with jax's threads.
LIMIT_AND_EXEC = """
import json, os, resource, sys
for name, value in json.loads(sys.argv[1]).items():
  kind = getattr(resource, name)
  hard = resource.getrlimit(kind)[1]
  value = value if hard == resource.RLIM_INFINITY else min(value, hard)
  resource.setrlimit(kind, (value, value))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
# The standard library without this environment's packages.
PYTHON = (sys.executable, '-I', '-S', '-B')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """The resources that a program may use.

  Attributes:
    seconds: of wall-clock time, and of processor time.
    memory: MiB of address space.
    processes: that it may start; Linux counts threads too.
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
    output: the end of the text that it printed.
    reason: why it was killed; '' where it was not.
  """

  code: int | None
  output: str
  reason: str = ''

  @property
  def passed(self) -> bool:
    return self.code == 0


@functools.cache
def isolation() -> str:
  """How programs are isolated: 'namespaces', or 'limits' where this machine gives this user no namespaces."""
  if sys.platform != 'linux' or not shutil.which('unshare'):
    return 'limits'
  with tempfile.TemporaryDirectory(prefix='isoflop-') as folder:
    probe = f'test ! -w / && touch {folder}/x && test "$(id -u)" = 0'
    command = [*UNSHARE, 'sh', '-c', READ_ONLY, 'sh', folder, 'sh', '-c', probe]
    try:
      process = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return 'limits'
  return 'namespaces' if process.returncode == 0 else 'limits'


def run_python(program: str, limits: Limits | None = None) -> Outcome:
  """Runs a Python program to its end or to a limit."""
  limits = limits or Limits()
  with tempfile.TemporaryDirectory(prefix='isoflop-', ignore_cleanup_errors=True) as folder:
    folder = os.path.realpath(folder)  # as /proc/self/mounts spells it
    (pathlib.Path(folder) / 'program.py').write_text(program, errors='replace')
    limited = json.dumps(_resources(limits))
    command = [*PYTHON, '-c', LIMIT_AND_EXEC, limited, *PYTHON[1:], 'program.py']
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
  """The limits by their names in `resource`.

  The kernel does not apply RLIMIT_NPROC to root. There the time limit ends a fork bomb.
  """
  return {
    'RLIMIT_AS': limits.memory * MIB,
    'RLIMIT_CPU': int(limits.seconds) + 1,
    'RLIMIT_FSIZE': limits.file * MIB,
    'RLIMIT_NOFILE': 64,
    'RLIMIT_CORE': 0,
    'RLIMIT_NPROC': _threads_of_user() + limits.processes,
  }


def _threads_of_user() -> int:
  """How many threads this user has now. The kernel's limit is on all threads of a user."""
  user = os.getuid()
  count = 0
  for status in pathlib.Path('/proc').glob('[0-9]*/status'):
    # A process may end while its file is read.
    with contextlib.suppress(OSError, ValueError):
      fields = dict(line.split(':', 1) for line in status.read_text().splitlines() if ':' in line)
      if int(fields['Uid'].split()[0]) == user:
        count += int(fields['Threads'])
  return count


def _watch(process: subprocess.Popen, limits: Limits) -> Outcome:
  """Reads the program's output until the program ends or exceeds a limit."""
  deadline = time.monotonic() + limits.seconds
  text = b''
  with selectors.DefaultSelector() as selector:
    selector.register(process.stdout, selectors.EVENT_READ)
    while True:
      left = deadline - time.monotonic()
      if left <= 0:
        return Outcome(None, _tail(text), f'it ran longer than {limits.seconds:g} s')
      if not selector.select(min(left, 0.2)):
        # The pipe of a program that has ended is still open where a child of it holds the other end.
        if process.poll() is not None:
          break
        continue
      piece = os.read(process.stdout.fileno(), 65536)
      text += piece
      if len(text) > limits.output * 1024:
        return Outcome(None, _tail(text), f'it printed more than {limits.output} KiB')
      if not piece:
        break
  try:
    code = process.wait(max(0.0, deadline - time.monotonic()))
  except subprocess.TimeoutExpired:
    return Outcome(None, _tail(text), f'it ran longer than {limits.seconds:g} s')
  return Outcome(code, _tail(text))


def _tail(text: bytes) -> str:
  """The end of an output, where an error or a mark stands."""
  return text[-2000:].decode(errors='replace')


def _kill(process: subprocess.Popen, folder: str) -> None:
  """Kills every process that a program started. In a namespace they die with the first of them."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.stdout.close()
  process.wait()
  # Without namespaces a process may have left the group. Its HOME is still the program's folder.
  for environment in pathlib.Path('/proc').glob('[0-9]*/environ'):
    with contextlib.suppress(OSError):
      if f'HOME={folder}\0'.encode() in environment.read_bytes():
        os.kill(int(environment.parent.name), signal.SIGKILL)
