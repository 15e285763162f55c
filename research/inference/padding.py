"""Prompts padded to few lengths, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np

SHORTEST = 32  # the least length that a prompt is padded to


def padded_length(length: int, most: int) -> int:
  """A power of two that is long enough, at most `most`: few lengths, so few programs."""
  padded = SHORTEST
  while padded < length:
    padded *= 2
  return min(padded, most)


def padded_row(side: str, tokens: Sequence[int], length: int) -> dict[str, np.ndarray]:
  padded, real = np.zeros((2, 1, length), np.int32)
  padded[0, : len(tokens)], real[0, : len(tokens)] = tokens, 1
  return {f'{side}_input_tokens': padded, f'{side}_segment_ids': real}
