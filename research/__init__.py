"""Isoflop, a language-model laboratory for scaling laws: commands (`python -m research.train`) over rooms."""

import sys


def _say_interrupted(kind, error, trace) -> None:
  import os

  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, trace)
    return
  sys.stderr.write('interrupted\n')
  sys.stderr.flush()
  os._exit(130)


# Python's word for a command that is being looked for. Until `core.cli` is there, Ctrl-C would be a traceback.
if sys.argv[:1] == ['-m']:
  sys.excepthook = _say_interrupted
