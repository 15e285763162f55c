"""Frozen streams opened, and their examples in batches, each a pure function of (seed, step).

No TensorFlow here: a stream that is not on disk yet is frozen by `python -m research.freeze`, started in
a process of its own.
"""

import queue
import threading

import numpy as np

from research.core.errors import UserError
from research.data.frozen import Batch, Frozen, FrozenMixture
from research.data.mixtures import Curriculum


def shortened(batch: Batch, cut: int) -> Batch:
  """Every row as `cut` shorter rows. A document that a cut goes through starts again at position 0."""
  if cut == 1:
    return batch
  sides = {k.split('_')[0] for k in batch}
  length = batch[next(iter(batch))].shape[1]
  if len(sides) > 1 or length % cut:
    raise UserError(f'rows of {length} cannot be cut into {cut}: only one stack, in equal parts.')
  out = {k: v.reshape(-1, length // cut) for k, v in batch.items()}
  side = sides.pop()
  ids, positions = (out.get(f'{side}_{k}') for k in ('segment_ids', 'positions'))
  if positions is not None:
    same = ids == ids[:, :1]
    out[f'{side}_positions'] = np.where(same & (ids > 0), positions - positions[:, :1], positions)
  return out


def batch_at(
  frozen, batch_size: int | Curriculum, seed: int, index: int, share: int = 0, shares: int = 1
) -> Batch:
  """Batch `index` of the endless, shuffled stream; of it the share `share` of `shares` equal ones."""
  if not isinstance(batch_size, Curriculum):
    batch_size = Curriculum(batch_size)
  first, size, cut = batch_size.at(index)
  if size % shares:
    raise UserError(f'a batch of {size} cannot be shared by {shares} processes equally.')
  part = size // shares
  return shortened(frozen.at(seed, first + share * part + np.arange(part)), cut)


def batches(
  frozen: Frozen | FrozenMixture,
  batch_size: int | Curriculum,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
):
  """Batches without end, from batch `start` on; this process's rows of each.

  Batch i of the whole job is a function of (frozen, batch_size, seed, i) alone; process p gets its
  p-th contiguous share. So a job resumes anywhere, on any number of processes, from the one integer i.

  Args:
    frozen: the stream.
    batch_size: examples in the whole job's batch, or how that number grows.
    seed: of the order of examples; every epoch has another order.
    start: index of the first batch.
    process_index: which share to give.
    process_count: into how many shares a batch is cut.
    prefetch: batches made ahead, in a thread; 0 makes each when asked.

  Yields:
    {key: (batch_size / process_count, length) int32}.
  """
  batch_at(frozen, batch_size, seed, start, process_index, process_count)  # an error is met here

  def made():
    i = start
    while True:
      yield batch_at(frozen, batch_size, seed, i, process_index, process_count)
      i += 1

  return prefetched(made(), prefetch) if prefetch else made()


def eval_batches(
  frozen: Frozen | FrozenMixture, batch_size: int, process_index: int = 0, process_count: int = 1
):
  """All examples once, in order; the last batch is filled up with rows of zero loss weight."""
  if batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} cannot be shared by {process_count} processes equally.'
    )
  share = batch_size // process_count
  n = len(frozen)
  for first in range(0, n, batch_size):
    at = first + process_index * share + np.arange(share)
    batch = frozen.examples(np.minimum(at, n - 1))
    for key in batch:
      if key.endswith('_loss_weights'):
        batch[key] = np.where(at[:, None] < n, batch[key], 0)
    yield batch


def prefetched(items, ahead: int):
  """The same items, made up to `ahead` of them early in a thread; an error comes where its item would."""
  made, stop = queue.Queue(ahead), threading.Event()

  def put(item):
    while not stop.is_set():
      try:
        return made.put(item, timeout=0.2)
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
      item, error = made.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield item
  finally:
    stop.set()
