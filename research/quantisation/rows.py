"""Rows of tokens to calibrate and to validate on: a run's own streams, or a text with a folder's tokenizer."""

import pathlib
from collections.abc import Iterator

import numpy as np

from research.core.errors import UserError
from research.data import cache
from research.data.batches import batch_at, eval_batches
from research.inference.tokenizer import Tokenizer
from research.training.run import Run

BATCH_TOKENS = 4096  # of a batch: what a model of any size takes on a CPU


def of_run(run: Run, rows: int) -> tuple[list[dict], list[dict]]:
  """Batches of a run's training stream, `rows` examples or all, and all of its validation stream.

  Raises:
    UserError: a stream cannot be opened.
  """
  train, validation = cache.open_streams([run.train, run.validation])
  size = max(1, BATCH_TOKENS // sum(run.train.lengths.values()))
  number = max(1, -(-min(rows, len(train)) // size))
  calibration = [batch_at(train, size, run.seed, i) for i in range(number)]
  return calibration, list(eval_batches(validation, size))


def of_text(file: str, tokenizer: Tokenizer, length: int, rows: int | None) -> list[dict]:
  """Batches of a decoder's rows: a text cut into rows of `length` targets, `rows` of them or all.

  Raises:
    UserError: there is no such file, or it is shorter than a row.
  """
  path = pathlib.Path(file)
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{file} cannot be read as text: {error}.') from error
  ids = np.array(tokenizer.encode(text), np.int32)
  number = (len(ids) - 1) // length
  if number < 1:
    raise UserError(
      f'{file} has {len(ids)} tokens, less than a row of {length}; take a smaller --length.'
    )
  number = number if rows is None else min(number, rows)
  targets = ids[1 : 1 + number * length].reshape(number, length)
  inputs = ids[: number * length].reshape(number, length)
  return list(_batches(inputs, targets, max(1, BATCH_TOKENS // length)))


def _batches(inputs, targets, size: int) -> Iterator[dict]:
  """Rows in batches of one size; a row of loss weight 0 fills up the last."""
  for start in range(0, len(inputs), size):
    index = np.arange(start, start + size)
    rows = np.minimum(index, len(inputs) - 1)
    weights = np.broadcast_to((index < len(inputs))[:, None], targets[rows].shape)
    yield {
      'decoder_input_tokens': inputs[rows],
      'decoder_target_tokens': targets[rows],
      'decoder_loss_weights': weights.astype(np.int32),
    }
