"""Errors of an input: one sentence that says where the error is and how to correct it."""

import difflib
import traceback


class UserError(Exception):
  """A mistake in an input. Commands print only its message, without a traceback, and exit with status 2."""


class Invalid(UserError, ValueError):
  """A bad value of one field of a configured class.

  `research.core.configs` adds the gin file and line that set `owner.field`.
  """

  def __init__(self, owner: type, field: str, why: str):
    self.owner = owner
    self.field = field
    self.why = why
    super().__init__(f'{owner.__name__}.{field}: {why}')


def did_you_mean(name: str, options) -> str:
  """Returns ' Did you mean X?' for the nearest of `options`, or a short list of them, or nothing."""
  options = sorted(map(str, options))
  near = difflib.get_close_matches(str(name), options, n=2, cutoff=0.6)
  if near:
    return f' Did you mean {" or ".join(near)}?'
  return f' Known: {", ".join(options)}.' if options and len(options) <= 30 else ''


def failure(error: BaseException) -> str:
  """Returns a clause about an exception of other code: 'ValueError at model.py:12: its message'."""
  if isinstance(error, SyntaxError) and error.filename:
    place = f' at {error.filename}:{error.lineno}'
    why = error.msg
  else:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if 'importlib' not in f.filename]
    place = f' at {frames[-1].filename}:{frames[-1].lineno}' if frames else ''
    why = (str(error).strip().splitlines() or [''])[0]
  return f'{type(error).__name__}{place}: {why}'.rstrip(' :.')
