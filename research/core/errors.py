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


def first_line(error: object, otherwise: str | None = None) -> str:
  """Returns the first line of what an error (or a message) says, without its full stop.

  Args:
    otherwise: what to return where it says nothing; None is the name of its class.
  """
  lines = str(error).strip().splitlines()
  if lines:
    return lines[0].rstrip('. ')
  return type(error).__name__ if otherwise is None else otherwise


def in_a_line(error: BaseException) -> str:
  """Returns the kind of an error and the first line of what it says: 'ValueError: its message'."""
  said = first_line(error, '')
  return f'{type(error).__name__}: {said}' if said else type(error).__name__


def failure(error: BaseException) -> str:
  """Returns a clause about an exception of other code: 'ValueError at model.py:12: its message'."""
  if isinstance(error, SyntaxError) and error.filename:
    place = f' at {error.filename}:{error.lineno}'
    why = error.msg
  else:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if 'importlib' not in f.filename]
    place = f' at {frames[-1].filename}:{frames[-1].lineno}' if frames else ''
    why = first_line(error, '')
  return f'{type(error).__name__}{place}: {why}'.rstrip(' :.')
