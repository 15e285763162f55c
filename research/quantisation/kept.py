"""Finds the codes of a matrix that was packed before, as in a GGUF file: nothing is rounded.

A reader makes float32 numbers of a packed file, whatever its format. They still lie on the grid of their group,
so the codes can be found again, and every number is compared. This works behind every reader.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from research.core.errors import UserError
from research.quantisation.formats import Format
from research.quantisation.rounding import Rounded

# Of groups [groups, group], their scales and offsets (or None) [groups, 1].
Grid = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def keep(
  matrix: np.ndarray, gram: np.ndarray | None, group: int, form: Format, offsets: bool
) -> Rounded:
  """The codes, scales and offsets that stand for exactly these numbers. Arguments as of `rounding.nearest`.

  Raises:
    UserError: a group is on no grid of the format.
  """
  outputs = matrix.shape[1]
  rows = matrix.reshape(-1, group, outputs).swapaxes(1, 2).reshape(-1, group)
  scale = np.ones((len(rows), 1), np.float16 if offsets else np.float32)
  offset = np.zeros_like(scale) if offsets else None
  left = np.arange(len(rows))  # the groups whose grid is not found yet
  for grid in _grids_with_offset(form) if offsets else _grids(form):
    x = rows[left]
    s, o = grid(x)
    is_exact = np.all(form.decode(form.encode(x, s, o), s, o) == x, axis=1)
    scale[left[is_exact]] = s[is_exact]
    if offsets:
      offset[left[is_exact]] = o[is_exact]
    left = left[~is_exact]
    if not len(left):
      break
  else:
    raise UserError(
      f'{len(left)} of {len(rows)} groups of {group} numbers are on no grid of {form.name}, so they cannot be '
      "kept; take the file's format and GROUP, or another --method."
    )
  codes = form.encode(rows, scale, offset)

  def turned(x):
    return x.reshape(-1, outputs, x.shape[1]).swapaxes(1, 2).reshape(-1, outputs)

  return Rounded(turned(codes), turned(scale), turned(offset) if offsets else None)


def _grids(form: Format) -> Iterator[Grid]:
  """Grids without an offset: the largest magnitude of a group has each value of the format in turn.

  The product of a float32 scale and a code was rounded, so the scale may be a neighbour of the quotient.
  """
  every = np.arange(2**form.bits).astype(np.uint8)
  values = np.abs(form.decode(every.view(np.int8) if form.name == 'int8' else every))
  for value in np.unique(values[(values > 0) & (values <= form.top)])[::-1]:
    for towards in (None, np.inf, 0):
      yield functools.partial(_of_largest, value, towards)


def _of_largest(value: float, towards: float | None, x: np.ndarray) -> tuple[np.ndarray, None]:
  largest = np.abs(x).max(axis=1, keepdims=True)
  scale = np.where(largest > 0, largest / value, 1).astype(np.float32)
  return scale if towards is None else np.nextafter(scale, np.float32(towards)), None


def _grids_with_offset(form: Format) -> Iterator[Grid]:
  """Grids whose smallest and largest number are each number of steps apart in turn.

  The smallest has the code 0 (Q4_1), or the largest has it, under a negative scale (Q4_0), or the code in the
  middle stands for 0 (symmetric GPTQ). Scale and offset are float16, so that they are found to the bit.
  """
  for steps in range(2**form.bits - 1, 0, -1):
    for kind in ('smallest', 'largest', 'middle'):
      yield functools.partial(_of_ends, kind, steps, form.bits)


def _of_ends(kind: str, steps: int, bits: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  low = x.min(axis=1, keepdims=True)
  high = x.max(axis=1, keepdims=True)
  step = ((high - low) / steps).astype(np.float16)
  step = np.where(step > 0, step, np.float16(1))
  if kind == 'smallest':
    return step, low.astype(np.float16)
  if kind == 'largest':
    return -step, high.astype(np.float16)
  return step, np.float16(-(2 ** (bits - 1))) * step
