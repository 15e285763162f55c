"""Rows of evaluation as the batch that a model reads, by seqio's keys."""

import numpy as np

from research.evaluation.rows import Row


def batch_of(
  rows: list[Row], length: int, encoder_length: int = 0, prefix: bool = False, marked: bool = False
) -> dict:
  """Rows as arrays [batch, length] int32, padded on the right with zeros.

  Args:
    length: of the decoder's rows.
    encoder_length: of the encoder's rows; 0 without an encoder.
    prefix: whether the first tokens of a row see each other both ways.
    marked: whether the batch tells which tokens are padding. A prompt that is read for decoding must, or its
      padding would enter the cache.
  """
  batch = {
    'decoder_input_tokens': _padded([row.inputs for row in rows], length),
    'decoder_target_tokens': _padded([row.targets for row in rows], length),
  }
  if prefix:
    batch['decoder_causal_attention'] = _padded([(1,) * row.prefix for row in rows], length)
  if encoder_length:
    batch['encoder_input_tokens'] = _padded([row.encoder for row in rows], encoder_length)
    filled = [(1,) * len(row.encoder) for row in rows]
    batch['encoder_segment_ids'] = _padded(filled, encoder_length)
    # The decoder's own segment is 1 throughout, so that all of it sees the encoder's tokens.
    batch['decoder_segment_ids'] = np.ones((len(rows), length), np.int32)
  if marked:
    batch['decoder_segment_ids'] = _padded([(1,) * len(row.inputs) for row in rows], length)
  return batch


def _padded(rows: list[tuple[int, ...]], length: int) -> np.ndarray:
  """int32 [rows, length], zeros behind each row."""
  padded = np.zeros((len(rows), length), np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded
