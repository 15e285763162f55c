"""Isoflop, a language-model laboratory for scaling laws: commands (`python -m research.train`) over rooms."""

import os
import sys


def end_interrupted(number, frame) -> None:
  """Ends a command whose modules are still being imported, at Ctrl-C.

  An exception would not do: some packages catch all that is raised while they import, and half of a module
  cannot be asked to end.
  """
  try:
    os.write(2, b'interrupted\n')
  finally:
    os._exit(130)


# Python's word for a command that is being looked for. From `core.cli.run` on Ctrl-C is an exception.
if sys.argv[:1] == ['-m']:
  import _signal  # `signal` makes classes of its numbers first, and Ctrl-C then would be a traceback

  # A job in the background ignores Ctrl-C, and goes on to.
  if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, end_interrupted)
