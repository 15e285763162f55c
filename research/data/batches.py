"""Batches of the examples of a frozen stream. Every batch is a pure function of the seed and the step."""

import queue
import threading

import numpy as np

from research.core.errors import UserError
from research.data.frozen import Batch, Frozen, FrozenMixture
from research.data.mixtures import Curriculum

# The key under which a training step adds seeds to a batch, uint32 [rows, 2].
ROW_SEEDS = 'row_seeds'


def shortened(batch: Batch, cut: int) -> Batch:
  """Returns the batch with every row cut into `cut` shorter rows. A cut document restarts at position 0.

  Raises:
    UserError: the batch is of an encoder-decoder, or `cut` does not divide its rows.
  """
  if cut == 1:
    return batch
  sides = {k.split('_')[0] for k in batch}
  length = batch[next(iter(batch))].shape[1]
  if len(sides) > 1 or length % cut:
    why = 'an encoder-decoder has no shorter rows' if len(sides) > 1 else 'choose a divisor'
    raise UserError(f'rows of {length} tokens cannot be cut into {cut} equal parts: {why}.')
  out = {k: v.reshape(-1, length // cut, *v.shape[2:]) for k, v in batch.items()}
  side = sides.pop()
  ids = out.get(f'{side}_segment_ids')
  positions = out.get(f'{side}_positions')
  if positions is not None:
    # Only the first document of a row can have lost its beginning to the cut.
    in_first = (ids == ids[:, :1]) & (ids > 0)
    out[f'{side}_positions'] = np.where(in_first, positions - positions[:, :1], positions)
  return out


def batch_at(
  frozen, batch_size: int | Curriculum, seed: int, index: int, share: int = 0, shares: int = 1
) -> Batch:
  """Returns the rows of one process in batch `index` of the endless, shuffled stream.

  Args:
    frozen: the stream.
    batch_size: examples in a whole batch, or a curriculum of batch sizes.
    seed: of the order of the examples.
    index: the number of the batch, from 0.
    share: the number of the process.
    shares: the number of processes, which have equal, contiguous shares of the rows.
  """
  if not isinstance(batch_size, Curriculum):
    batch_size = Curriculum(batch_size)
  first, size, cut = batch_size.at_step(index)
  if size % shares:
    raise UserError(f'a batch of {size} does not divide equally among {shares} processes.')
  part = size // shares
  return shortened(frozen.examples_at(seed, first + share * part + np.arange(part)), cut)


def batches(
  frozen: Frozen | FrozenMixture,
  batch_size: int | Curriculum,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
):
  """Yields this process's rows of every batch from batch `start` on, without end.

  Batch i of the whole job depends only on (frozen, batch_size, seed, i), and process p gets the p-th contiguous
  share of its rows. So a job can resume from the integer i, on any number of processes.

  Args:
    frozen: the stream.
    batch_size: examples in a batch of the whole job, or a curriculum of batch sizes.
    seed: of the order of the examples, which differs from epoch to epoch.
    start: index of the first batch.
    process_index: which share of a batch to yield.
    process_count: how many shares a batch has.
    prefetch: how many batches a thread prepares ahead; 0 prepares each batch on demand.

  Yields:
    {key: (batch_size / process_count, length) int32}. Scores of a model may be float32 and [..., length, k].
  """
  # A wrong size is an error of this call, and not of the first batch, which a thread may make.
  batch_at(frozen, batch_size, seed, start, process_index, process_count)

  def generate():
    index = start
    while True:
      yield batch_at(frozen, batch_size, seed, index, process_index, process_count)
      index += 1

  return prefetched(generate(), prefetch) if prefetch else generate()


def eval_batches(
  frozen: Frozen | FrozenMixture, batch_size: int, process_index: int = 0, process_count: int = 1
):
  """Yields all examples once, in order. The last batch is filled with rows of loss weight 0."""
  if batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} does not divide equally among {process_count} processes.'
    )
  share = batch_size // process_count
  n = len(frozen)
  for first in range(0, n, batch_size):
    indices = first + process_index * share + np.arange(share)
    batch = frozen.examples(np.minimum(indices, n - 1))
    for key in batch:
      if key.endswith('_loss_weights'):
        batch[key] = np.where(indices[:, None] < n, batch[key], 0)
    yield batch


def prefetched(items, ahead: int):
  """Yields the same items; a thread prepares up to `ahead` of them. An error is raised in its item's place."""
  ready = queue.Queue(ahead)
  stop = threading.Event()

  def put(item):
    # With a timeout, so that the thread ends if the consumer stops reading.
    while not stop.is_set():
      try:
        return ready.put(item, timeout=0.2)
      except queue.Full:
        continue

  def work():
    try:
      for item in items:
        put((item, None))
        if stop.is_set():
          return
      put((None, StopIteration()))
    except BaseException as e:
      put((None, e))

  threading.Thread(target=work, daemon=True).start()
  try:
    while True:
      item, error = ready.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield item
  finally:
    stop.set()
