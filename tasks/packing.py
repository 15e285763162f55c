"""Packs and converts examples in blocks, with the results of seqio and several times as fast.

The feature converters of seqio convert one example at a time and pack in a TensorFlow loop, which takes most of
the time of freezing. This module packs a block of examples with NumPy, and then calls the code of the same
converter once. With `open_bins=1` the packing equals `seqio.trim_and_pack_dataset` to the token; with more open
bins, first fit leaves less padding.
"""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

OPEN_BINS = 32
# The converters of seqio that give a loss weight to every target token but 0.
_WEIGHTS_FROM_TOKENS = (seqio.LMFeatureConverter, seqio.EncDecFeatureConverter)

# A column of a block: the values of all examples in one flat array, and the length of each example.
Column = tuple[np.ndarray, np.ndarray]


def first_fit(lengths: np.ndarray, limits: np.ndarray, open_bins: int):
  """Which bin each example goes to.

  Args:
    lengths: (examples, features) tokens.
    limits: (features,) what a bin holds.
    open_bins: bins that may still take an example; when there are more, the oldest is closed.

  Returns:
    (bins, starts, count): (examples,) bin of each example, (examples, features) tokens that were in
    that bin before it, and how many bins there are.
  """
  bins = np.zeros(len(lengths), np.int64)
  starts = np.zeros_like(lengths)
  limits = limits.tolist()
  used = []  # tokens in each bin, by feature
  waiting = []  # the open bins, oldest first
  for i, sizes in enumerate(lengths.tolist()):
    if sizes == limits:  # as most parts of a long document: it fills a bin of its own
      bins[i] = len(used)
      used.append(sizes)
      if open_bins == 1:
        waiting.clear()
      continue
    for b in waiting:
      if all(u + s <= m for u, s, m in zip(used[b], sizes, limits, strict=True)):
        break
    else:
      b = len(used)
      used.append([0] * len(limits))
      waiting.append(b)
      if len(waiting) > open_bins:
        waiting.pop(0)
    bins[i], starts[i] = b, used[b]
    used[b] = [u + s for u, s in zip(used[b], sizes, strict=True)]
    if used[b] == limits:
      waiting.remove(b)
  return bins, starts, len(used)


def pack(columns: Mapping[str, Column], limits: Mapping[str, int], open_bins=OPEN_BINS):
  """Packs a block of examples; longer ones are trimmed.

  Returns:
    {key, key_segment_ids, key_positions: (bins, limits[key]) int32}. Segments count from 1 in every
    bin, in the order in which they lie there; padding is 0.
  """
  sizes = np.stack([np.minimum(columns[k][1], limits[k]) for k in limits], axis=1)
  bins, starts, n = first_fit(sizes, np.array(list(limits.values())), open_bins)
  order = np.argsort(bins, kind='stable')
  segments = np.empty(len(bins), np.int32)
  first = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=n))])
  segments[order] = np.arange(len(bins)) - first[bins[order]] + 1
  packed = {}
  for f, (key, limit) in enumerate(limits.items()):
    values, lengths = columns[key]
    size = sizes[:, f]
    # For every token that stays: its position in its example, in the flat column, and in the flat bins.
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    source = within + np.repeat(np.cumsum(lengths) - lengths, size)
    target = within + np.repeat(bins * limit + starts[:, f], size)
    for name, flat in (
      (key, values[source]),
      (f'{key}_segment_ids', np.repeat(segments, size)),
      (f'{key}_positions', within),
    ):
      packed[name] = np.zeros(n * limit, np.int32)
      packed[name][target] = flat
      packed[name] = packed[name].reshape(n, limit)
  return packed


def cut(columns: Mapping[str, Column], limit: int) -> dict[str, Column]:
  """Every example cut into parts of `limit` tokens, the last one shorter: t5's `split_tokens`."""
  out = {}
  for key, (values, size) in columns.items():
    parts = -(-size // limit)
    lengths = np.full(parts.sum(), limit)
    lengths[np.cumsum(parts) - 1] = size - (parts - 1) * limit
    out[key] = values, lengths
  return out


def gather(columns: Mapping[str, Column], chosen: np.ndarray) -> dict[str, Column]:
  """The `chosen` examples, in that order."""
  out = {}
  for key, (values, lengths) in columns.items():
    starts = (np.cumsum(lengths) - lengths)[chosen]
    size = lengths[chosen]
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    out[key] = values[np.repeat(starts, size) + within], size
  return out


def pad(columns: Mapping[str, Column], limits: Mapping[str, int]):
  """Rows of one example each, trimmed or padded with 0: {key: (examples, limits[key]) int32}.

  `key_filled` marks the tokens of a row, because a token may be 0 too.
  """
  singles = {k: (np.minimum(columns[k][1], m), m) for k, m in limits.items()}
  rows = {}
  for key, (size, limit) in singles.items():
    values, lengths = columns[key]
    grid = np.arange(limit)[None] < size[:, None]
    rows[key] = np.zeros(grid.shape, np.int32)
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    rows[key][grid] = values[within + np.repeat(np.cumsum(lengths) - lengths, size)]
    rows[f'{key}_filled'] = grid
  return rows


def join(columns: Mapping[str, Column]) -> dict[str, Column]:
  """Concatenates inputs and targets and adds the width of the inputs, as PrefixLMFeatureConverter wants."""
  (inputs, a), (targets, b) = columns['inputs'], columns['targets']
  whole = np.empty(len(inputs) + len(targets), np.int32)
  from_inputs = np.repeat(np.tile([True, False], len(a)), np.stack([a, b], 1).ravel())
  whole[from_inputs], whole[~from_inputs] = inputs, targets
  size = a + b
  return {
    'targets': (whole, size),
    'inputs_width': (np.repeat(a, size), size),
    'inputs_width_add_pos': (np.repeat(a + 1, size), size),
  }


def convert(converter: seqio.FeatureConverter, columns, lengths, open_bins=OPEN_BINS):
  """Model features of a block of task examples: the stacked results of `converter(ds, lengths)`.

  Args:
    converter: an LM, PrefixLM or EncDec feature converter, or `MaskedLMFeatureConverter`.
    columns: {task feature: Column}.
    lengths: tokens per packed example; 'targets' is the whole length of a decoder.

  Returns:
    {model feature: (rows, length) int32}.
  """
  if isinstance(converter, seqio.PrefixLMFeatureConverter):
    columns = join(columns)
  total = max(lengths.values())
  limits = {k: lengths.get(k, total) for k in columns}
  rows = pack(columns, limits, open_bins) if converter.pack else pad(columns, limits)
  filled = {
    k: rows[f'{k}_segment_ids'] > 0 if converter.pack else rows.pop(f'{k}_filled') for k in limits
  }
  flat = {k: tf.constant(v.reshape(-1)) for k, v in _end_to_end(rows, converter.pack).items()}
  converted = converter._convert_example(flat)
  out = {k: v.numpy().reshape(len(next(iter(rows.values()))), -1) for k, v in converted.items()}
  for key in out:
    if key.endswith('_segment_ids'):
      out[key] = rows[f'{"inputs" if key.startswith("encoder") else "targets"}_segment_ids']
  if isinstance(converter, _WEIGHTS_FROM_TOKENS) and not hasattr(converter, 'sets_weights'):
    # seqio takes every 0 for padding, so it inverts the loss weight of a token of id 0.
    mistaken = filled['targets'] & (rows['targets'] == 0)
    out['decoder_loss_weights'] = np.where(
      mistaken, 1 - out['decoder_loss_weights'], out['decoder_loss_weights']
    )
  return out


def _end_to_end(rows, packed: bool):
  """Rows that a converter takes for one example when they are concatenated.

  A converter starts a sequence where the segment id changes, so no two rows may share an id. Without packing,
  every row is a segment, and the converter counts positions from the start of the first row.
  """
  rows = dict(rows)
  for key, row in rows.items():
    start = np.arange(len(row), dtype=np.int32)[:, None] * row.shape[1]
    if key.endswith('_segment_ids'):
      rows[key] = np.where(row > 0, row + start, 0)
    elif not packed and key.startswith('inputs_width'):
      rows[key] = row + start
  if not packed:
    targets = rows['targets']
    row_number = np.arange(1, len(targets) + 1, dtype=np.int32)[:, None]
    rows['targets_segment_ids'] = np.broadcast_to(row_number, targets.shape)
  return rows
