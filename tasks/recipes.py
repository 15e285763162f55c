"""How documents become packed rows: a recipe of seqio tasks and a converter, and what applies it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from tasks import packing
from tasks.files import Dropped

# The preprocessors of t5 take a random chunk of so many tokens from a longer document and drop the rest. So
# longer documents are cut first, and nothing is dropped.
LONGEST = 65536
# Task examples that are packed and converted at a time.
BLOCK = 8192

# One document: its tokens, or the tokens of a prompt and of its completion.
Document = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
  """One seqio Task: its preprocessors, the sequence_length that they see, its share of the text."""

  preprocessors: list[Callable]
  lengths: Mapping[str, int]
  rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How seqio makes the examples of one objective.

  Attributes:
    parts: tasks; each document goes to one of them, and their examples are mixed.
    features: the features of the tasks, each with its vocabulary.
    converter: the seqio feature converter.
    longest: cut documents into so many tokens before the preprocessors; None where they take any length.
    cut: cut examples into so many tokens after the preprocessors; None leaves them.
    omit: model features to leave out.
    rename: (old, new) text in the names of model features.
    encode: tokenises raw documents instead of the plain tokeniser. Returns (documents, `tasks.files.Dropped`),
      the counts of what it left out or shortened by reason, with the first places.
    select: leaves out tokenised documents that do not fit, and counts them likewise.
    finish: makes other model features of a block's; None leaves them.
  """

  parts: list[Part]
  features: Mapping[str, seqio.Feature]
  converter: seqio.FeatureConverter
  longest: int | None = LONGEST
  cut: int | None = None
  omit: tuple[str, ...] = ()
  rename: tuple[str, str] | None = None
  encode: Callable[[list[bytes]], tuple[list[Document], Dropped]] | None = None
  select: Callable[[list[Document]], tuple[list[Document], Dropped]] | None = None
  finish: Callable[[dict], dict] | None = None


# Without AutoGraph, which would take seconds to search this code for branches on tensors. There are none.
@tf.autograph.experimental.do_not_convert
def task_dataset(recipe: Recipe, part: Part, documents: list[Document], seed: int):
  """The examples of a part over `documents`, as a tf.data.Dataset of {feature: (tokens,) int32}."""

  def source(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    columns = {}
    for key in documents[0]:
      ends = np.cumsum([0, *(len(d[key]) for d in documents)])
      columns[key] = tf.RaggedTensor.from_row_splits(
        np.concatenate([d[key] for d in documents]).astype(np.int32), ends
      )
    return tf.data.Dataset.from_tensor_slices(columns)

  task = seqio.Task(
    'isoflop',
    source=seqio.FunctionDataSource(source, splits=['train']),
    output_features=recipe.features,
    preprocessors=part.preprocessors,
  )
  with seqio.map_seed_manager(seed):
    return task.get_dataset(dict(part.lengths), 'train', shuffle=False, seed=seed)


def share_out(documents: list[Document], rates: list[float]) -> list[list[Document]]:
  """The documents of each part. A document goes to the part that is furthest behind its share of the tokens."""
  shares = [[] for _ in rates]
  tokens = np.zeros(len(rates))
  for document in documents:
    i = int(np.argmin(tokens / rates)) if len(rates) > 1 else 0
    tokens[i] += sum(map(len, document.values()))
    shares[i].append(document)
  return shares


def blocks(recipe: Recipe, documents: list[Document], lengths, seed: int) -> Iterator[dict]:
  """Model features of `documents`, shuffled, packed and converted, in blocks of rows.

  Args:
    recipe: of the objective.
    documents: token ids without EOS.
    lengths: tokens per packed example.
    seed: of the corruption and of the shuffle.

  Yields:
    {model feature: (rows, length) int32}.
  """
  if recipe.longest:
    step = recipe.longest
    documents = [
      {k: v[i : i + step] for k, v in d.items()}
      for d in documents
      for i in range(0, max(map(len, d.values())), step)
    ]
  shares = share_out(documents, [p.rate for p in recipe.parts])
  batches = []
  for i, (part, share) in enumerate(zip(recipe.parts, shares, strict=True)):
    if share:
      batches += task_dataset(recipe, part, share, seed + i).ragged_batch(BLOCK)
  if not batches:
    return
  columns = {}
  for key in batches[0]:
    values = np.concatenate([batch[key].values.numpy() for batch in batches])
    columns[key] = values, np.concatenate([batch[key].row_lengths().numpy() for batch in batches])
  if recipe.cut:
    columns = packing.cut(columns, recipe.cut)
  order = np.random.default_rng(seed).permutation(len(next(iter(columns.values()))[1]))
  for i in range(0, len(order), BLOCK):
    chosen = packing.gather(columns, order[i : i + BLOCK])
    rows = packing.convert(recipe.converter, chosen, lengths)
    rows = recipe.finish(rows) if recipe.finish else rows
    names = {k: k.replace(*recipe.rename) if recipe.rename else k for k in rows}
    yield {names[k]: v for k, v in rows.items() if k not in recipe.omit}
