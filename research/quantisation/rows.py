"""Rows of tokens to calibrate and to validate on: a run's own streams, or a text with a folder's tokenizer."""

import pathlib
from collections.abc import Iterator

import numpy as np

from research.core.errors import UserError
from research.data import cache
from research.data.batches import batch_at, eval_batches
from research.inference.tokenizer import Tokenizer
from research.training.experience import Experience
from research.training.run import Run

BATCH_TOKENS = 4096  # tokens of a batch: few enough for the memory of a CPU machine


def of_run(run: Run, rows: int) -> tuple[list[dict], list[dict]]:
  """Returns batches of a run's training stream, about `rows` examples, and of its whole validation stream.

  With 0 rows the training stream is not opened.

  Raises:
    UserError: a stream cannot be opened, or the run has no training stream.
  """
  size = max(1, BATCH_TOKENS // sum(run.train.lengths.values()))
  if not rows:
    return [], list(eval_batches(*cache.open_streams([run.validation]), size))
  if isinstance(run.train, Experience):
    raise UserError(
      'this run made its own training rows, so there is no stream to calibrate on; take --method=nearest, or '
      'convert the run to a Hugging Face folder and give --hf and two texts.'
    )
  train, validation = cache.open_streams([run.train, run.validation])
  number = -(-min(rows, len(train)) // size)
  calibration = [batch_at(train, size, run.seed, i) for i in range(number)]
  return calibration, list(eval_batches(validation, size))


def of_text(file: str, tokenizer: Tokenizer, length: int, rows: int | None) -> list[dict]:
  """Returns batches of a text cut into rows of `length` targets, for a decoder.

  Args:
    file: the text.
    tokenizer: the model's tokenizer.
    length: tokens of a row.
    rows: at most this many, taken evenly from the whole text; None takes all.

  Raises:
    UserError: the file cannot be read, or is shorter than a row.
  """
  path = pathlib.Path(file)
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{file} cannot be read as text: {error}.') from error
  ids = np.array(tokenizer.encode(text), np.int32)
  # Every row begins as a prompt does, since a model that always saw BOS loses much without it. Where prompts
  # have none, a row begins with the last token of the row before.
  begin = np.array(tokenizer.encode(''), np.int32)
  if not np.array_equal(ids[: len(begin)], begin):
    begin = begin[:0]
  ids = ids[len(begin) :]
  shared = 0 if len(begin) else 1
  step = length + 1 - len(begin) - shared
  number = (len(ids) - shared) // step
  if number < 1:
    raise UserError(
      f'{file} has {len(ids)} tokens, less than a row of {length}; take a smaller --length.'
    )
  tokens = ids[step * np.arange(number)[:, None] + np.arange(step + shared)]
  tokens = np.concatenate([np.tile(begin, (number, 1)), tokens], axis=1)
  targets = tokens[:, 1:]
  inputs = tokens[:, :-1]
  if rows is not None and rows < number:
    # Evenly over the whole text, whose parts may be of different kinds.
    chosen = np.arange(rows) * number // rows
    targets = targets[chosen]
    inputs = inputs[chosen]
  return list(_batches(inputs, targets, max(1, BATCH_TOKENS // length)))


def _batches(inputs, targets, size: int) -> Iterator[dict]:
  """Rows in batches of one size; rows of loss weight 0 fill the last batch."""
  for start in range(0, len(inputs), size):
    index = np.arange(start, start + size)
    rows = np.minimum(index, len(inputs) - 1)
    weights = np.broadcast_to((index < len(inputs))[:, None], targets[rows].shape)
    yield {
      'decoder_input_tokens': inputs[rows],
      'decoder_target_tokens': targets[rows],
      'decoder_loss_weights': weights.astype(np.int32),
    }
