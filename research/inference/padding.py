"""Pads prompts to a few lengths, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np

from research.parallel.axes import axis_size

SHORTEST = 16  # the smallest padded length


def padded_length(length: int, most: int, shortest: int = SHORTEST) -> int:
  """Returns the padded length of a row: the next power of two from `shortest` on, at most `most`.

  Args:
    shortest: a power of two.
  """
  padded = shortest
  while padded < length:
    padded *= 2
  return min(padded, most)


def padded_rows(side: str, rows: Sequence[Sequence[int]], length: int) -> dict[str, np.ndarray]:
  """Returns a batch [rows, length] with the tokens of 'decoder' or 'encoder', by seqio's keys."""
  padded, real = np.zeros((2, len(rows), length), np.int32)
  for row, tokens in enumerate(rows):
    padded[row, : len(tokens)] = tokens
    real[row, : len(tokens)] = 1
  return {f'{side}_input_tokens': padded, f'{side}_segment_ids': real}


def for_mesh(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a batch of one row as n equal rows, if the mesh in use splits a batch into n parts.

  A batch of several rows stays as it is.
  """
  parts = axis_size('batch')
  return {name: np.repeat(x, parts, axis=0) if len(x) == 1 else x for name, x in batch.items()}
