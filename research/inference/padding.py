"""Pads prompts to a few lengths, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np

from research.parallel.axes import axis_size

SHORTEST = 32  # the smallest padded length


def padded_length(length: int, most: int, shortest: int = SHORTEST) -> int:
  """Returns the padded length of a row: the next power of two from `shortest` on, at most `most`.

  Args:
    shortest: a power of two.
  """
  padded = shortest
  while padded < length:
    padded *= 2
  return min(padded, most)


def for_mesh(row: np.ndarray) -> np.ndarray:
  """Returns one row [1, length] as n equal rows, where the mesh in use splits a batch into n parts."""
  return np.repeat(row, axis_size('batch'), axis=0)


def padded_row(side: str, tokens: Sequence[int], length: int) -> dict[str, np.ndarray]:
  """Returns the batch of one prompt, by seqio's keys, with the tokens of 'decoder' or 'encoder'.

  It has one row, [1, length], or as many equal rows as the mesh in use needs (`for_mesh`).
  """
  padded, real = np.zeros((2, 1, length), np.int32)
  padded[0, : len(tokens)] = tokens
  real[0, : len(tokens)] = 1
  return {f'{side}_input_tokens': for_mesh(padded), f'{side}_segment_ids': for_mesh(real)}
