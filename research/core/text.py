"""Formats numbers, durations and text for a person, and prints lines of progress."""

import math
import sys


def tell(line: str) -> None:
  """Prints a line about the work that goes on to stderr: stdout is for what a command was asked for."""
  print(line, file=sys.stderr, flush=True)


def si(value: float, unit: str = '') -> str:
  """Returns a number in three digits: 1234567 -> '1.23M'; a dash if it is not finite.

  Without a unit the letters are those of parameter and token counts (k, M, B, T), and beyond 1e15 the number
  has an exponent. With a unit they are SI prefixes: si(3.5e10, 'FLOPs') -> '35 GFLOPs'.
  """
  value = float(value)
  if not math.isfinite(value):
    return '—'
  letters = ('', 'k', 'M', 'G', 'T', 'P', 'E') if unit else ('', 'k', 'M', 'B', 'T')
  scaled = value
  for letter in letters:
    if abs(scaled) < 999.5:
      number = f'{scaled:.3g}'
      return f'{number} {letter}{unit}' if unit else f'{number}{letter}'
    scaled /= 1000
  return f'{value:.3g} {unit}'.rstrip()


def clock(seconds: float) -> str:
  """3723 -> '1:02:03'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def one_line(value: str, length: int = 200) -> str:
  """Returns typed text for a message: unprintable characters escaped, and the middle of a long text cut out."""
  shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in value)
  half = length // 2
  return shown if len(shown) <= length else f'{shown[:half]}...{shown[-half:]}'
