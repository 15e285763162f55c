"""Shared by all commands: flags, errors as one sentence, the environment. Imports nothing heavy."""

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from research import end_interrupted
from research.core.errors import UserError, did_you_mean, first_line

INTERRUPTED = 130  # the exit status that shells expect after SIGINT
PIPE_CLOSED = 141  # the one after writing to a pipe that has no reader any more
_running: list[Callable] = []  # the command of `run`, unless an error of its own ended it

# Page faults of 4 KiB pages cost jax on a CPU a third of its time. Huge pages are chosen when a process starts.
CPU_ENVIRONMENT = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f'{self.prog}: {message}\n')


def parser(command: str, description: str, gin: bool = True) -> argparse.ArgumentParser:
  """Returns the parser of `python -m research.<command>`; `gin` adds --gin_file and --gin.NAME=VALUE."""
  _prepare_terminal()
  first, _, rest = description.partition('\n')
  result = _Parser(
    prog=f'python -m research.{command}',
    description=first,
    epilog=rest.strip(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  if gin:
    result.add_argument(
      '--gin_file',
      action='append',
      required=True,
      metavar='FILE',
      help='a gin file; several are read in order',
    )
    result.epilog = (
      (result.epilog or '')
      + '\n\n--gin.Class.argument=VALUE and --gin.MACRO=VALUE override the values of the files; '
      'a string needs quotes inside: --gin.TextFiles.files="\'books/*.txt\'".'
    ).strip()
  return result


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
  """Parses flags; the --gin.X=Y ones become the list `flags.gin`."""
  argv = sys.argv[1:] if argv is None else argv
  gin = [arg.removeprefix('--gin.') for arg in argv if arg.startswith('--gin.')]
  flags, unknown = parser.parse_known_args([arg for arg in argv if not arg.startswith('--gin.')])
  known = [option for action in parser._actions for option in action.option_strings]
  if unknown:
    parser.error(f'no flag {unknown[0]}.{did_you_mean(unknown[0].split("=")[0], known)}')
  if gin and '--gin_file' not in known:
    parser.error(f'no flag --gin.{gin[0]}: this command reads no gin.')
  flags.gin = gin
  return flags


def use_huge_pages() -> None:
  """Starts this command again, once, in the environment in which jax on a CPU is fastest."""
  missing = {k: v for k, v in CPU_ENVIRONMENT.items() if k not in os.environ}
  if missing and sys.platform == 'linux':
    os.environ.update(missing)
    # Ctrl-C is blocked until `_prepare_terminal` of the new process: while Python starts, it prints a
    # traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with contextlib.suppress(OSError):  # without permission to start it, this process continues
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run(main: Callable[..., int | None], *args) -> None:
  """Runs `main` and exits. The status is 2, with one sentence, for an error of the input or of the machine."""
  _prepare_terminal()
  if signal.getsignal(signal.SIGINT) is end_interrupted:
    signal.signal(signal.SIGINT, _interrupt)
  _running.append(main)
  try:
    code = main(*args) or 0
    for stream in (sys.stdout, sys.stderr):
      if stream is not None:
        stream.flush()
    sys.exit(code)
  except UserError as error:
    sys.exit(_say(f'error: {error}', 2))
  except KeyboardInterrupt:
    sys.exit(_say('interrupted', INTERRUPTED))
  except BrokenPipeError:
    if not any(map(_reader_is_gone, (1, 2))):
      raise
    # The rest of the buffers goes to the null device, or Python reports an error when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(PIPE_CLOSED)
  except Exception as error:
    sentence = machine_fault(error)
    if sentence is None:
      _running.clear()
      raise
    sys.exit(_say(f'error: {sentence}', 2))


def _interrupt(number, frame) -> None:
  """Ctrl-C in a command that runs: an exception, so that it saves and cleans up.

  Where it imports a module in the middle it just ends: packages catch the exception then, and go on, or crash.
  """
  inner = frame
  while inner is not None:
    if inner.f_code.co_filename.startswith('<frozen importlib'):
      end_interrupted(number, frame)
    inner = inner.f_back
  raise KeyboardInterrupt


def machine_fault(error: BaseException) -> str | None:
  """Returns a sentence about a fault of this machine (a full disk, a missing plugin), None for other errors."""
  text = ' '.join(map(str, _with_causes(error)))
  frames = traceback.extract_tb(error.__traceback__)
  # Without any plugin of the platform jax fails an assertion that has no text.
  if frames and frames[-1].filename.endswith('xla_bridge.py'):
    platforms = os.environ.get('JAX_PLATFORMS')
    setting = f'JAX_PLATFORMS={platforms}' if platforms else 'jax'
    first = first_line(error, 'no plugin')
    return (
      f'{setting}: this machine has no such platform, or jax lacks its plugin ({first}); '
      'unset JAX_PLATFORMS, set it to cpu, or install the extra (uv sync --extra cuda, --extra tpu).'
    )
  full = {errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the quota of the disk is used up',
          errno.EFBIG: 'a file may not grow any larger here'}  # fmt: skip
  number = getattr(error, 'errno', None)
  reason = full.get(number) or next(
    (why for n, why in full.items() if os.strerror(n) in text), None
  )
  if reason:
    name = getattr(error, 'filename', None)
    place = f' ({name})' if name else ''
    return f'{reason}{place}: free some space, and start the same command again to continue.'
  if number == errno.EROFS and error.filename:
    return f'{error.filename} is on a read-only disk; choose another folder.'
  if number == errno.EROFS:
    return (
      'a folder that Python needs is read-only (/dev/shm or the temporary folder): mount it for writing, or '
      'name another in TMPDIR.'
    )
  return None


def _with_causes(error: BaseException | None) -> list[BaseException]:
  """The error, what it was raised from, and so on."""
  found = []
  while error is not None and error not in found:
    found.append(error)
    error = error.__cause__
  return found


def _prepare_terminal() -> None:
  """Prints characters that a terminal lacks as question marks, and Ctrl-C as one word, also during imports."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError, ValueError):  # no terminal, or something in its place
      stream.reconfigure(errors='replace')
  sys.excepthook = _excepthook
  _quiet_hook(sys, 'unraisablehook')
  _quiet_hook(threading, 'excepthook')
  if hasattr(signal, 'pthread_sigmask'):  # `use_huge_pages` blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _is_echo_of_full_disk(kind, error) -> bool:
  """Returns whether an error is only TensorStore's callback into a save that a full disk has ended.

  The save itself reports the reason. After an error of the command itself `_running` is empty.
  """
  return bool(_running) and kind is RuntimeError and str(error) == 'Event loop is closed'


def _quiet_hook(module, name: str) -> None:
  """Wraps, once, the hook that Python calls for an exception that no code can catch."""
  hook = getattr(module, name)
  if getattr(hook, 'is_quiet', False):
    return

  def quiet(args):
    if not _is_echo_of_full_disk(args.exc_type, args.exc_value):
      hook(args)

  quiet.is_quiet = True
  setattr(module, name, quiet)


def _excepthook(kind, error, trace) -> None:
  if _is_echo_of_full_disk(kind, error):
    return
  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, trace)
    return
  _say('interrupted', INTERRUPTED)
  os._exit(INTERRUPTED)  # without clean-up: modules may be half loaded


def _reader_is_gone(descriptor: int) -> bool:
  """Returns whether the other end of a pipe was closed."""
  try:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
  except (AttributeError, OSError):
    return False


def _say(message: str, code: int) -> int:
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)
  return code
