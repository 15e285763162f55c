"""What a person is told when an input is wrong: one sentence, where to mend it, what to try."""

import difflib
import traceback


class UserError(Exception):
  """A mistake in an input. Commands print its message alone, without a traceback, and exit 2."""


class Invalid(UserError, ValueError):
  """A bad value of one field of a configured class.

  `research.core.configs` adds the gin file and line that set `owner.field`.
  """

  def __init__(self, owner: type, field: str, why: str):
    self.owner, self.field, self.why = owner, field, why
    super().__init__(f'{owner.__name__}.{field}: {why}')


def did_you_mean(name: str, options) -> str:
  """' Did you mean X?' for the nearest of `options`, or the whole short list, or nothing."""
  options = sorted(map(str, options))
  near = difflib.get_close_matches(str(name), options, n=2, cutoff=0.6)
  if near:
    return f' Did you mean {" or ".join(near)}?'
  return f' Known: {", ".join(options)}.' if options and len(options) <= 30 else ''


def failure(error: BaseException) -> str:
  """An exception of somebody's code in a clause: 'ValueError at model.py:12: what it says'."""
  if isinstance(error, SyntaxError) and error.filename:
    place, why = f' at {error.filename}:{error.lineno}', error.msg
  else:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if 'importlib' not in f.filename]
    place = f' at {frames[-1].filename}:{frames[-1].lineno}' if frames else ''
    why = (str(error).strip().splitlines() or [''])[0]
  return f'{type(error).__name__}{place}: {why}'.rstrip(' :.')
