"""seqio Tasks for `research.objectives`: t5's and seqio's own preprocessors over tokenised documents."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
import seqio
import t5.data.preprocessors as t5
import tensorflow as tf

from research import objectives
from research.streams import Stream
from tasks import packing

# t5's preprocessors take a random chunk of this many tokens from a longer document and drop the rest;
# longer documents are therefore cut here first, and nothing is dropped.
LONGEST = 65536
# Task examples that are packed and converted at a time.
BLOCK = 8192
# A causal LM's documents pass through seqio in chunks of about so many tokens, cut to length after:
# what seqio costs, it costs per example.
CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one objective is built.

  Attributes:
    preprocessors: seqio preprocessors from {'targets': tokens} to the task's features.
    features: the task's features, each with its vocabulary.
    task_lengths: what the preprocessors see as sequence_length.
    converter: the seqio feature converter.
    longest: documents of more tokens are cut here first; None where the preprocessors take any.
    cut: examples are cut to this many tokens after the preprocessors; None leaves them.
  """

  preprocessors: list[Callable]
  features: Mapping[str, seqio.Feature]
  task_lengths: Mapping[str, int]
  converter: seqio.FeatureConverter
  longest: int | None = LONGEST
  cut: int | None = None


def recipe(stream: Stream, vocabulary: seqio.Vocabulary) -> Recipe:
  """The preprocessors and the converter of `stream`'s objective."""
  return _RECIPES[type(stream.task)](stream, vocabulary)


def _converter(stream: Stream, **kwargs) -> seqio.FeatureConverter:
  if stream.architecture == 'encoder_decoder':
    return seqio.EncDecFeatureConverter(pack=stream.packing, **kwargs)
  return seqio.PrefixLMFeatureConverter(pack=stream.packing, **kwargs)


def append_eos(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
  """EOS at the end of every document, before it is split."""
  eos = [output_features['targets'].vocabulary.eos_id]
  return dataset.map(lambda x: {**x, 'targets': tf.concat([x['targets'], eos], 0)})


def split(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Documents cut into segments of the targets' length."""
  return t5.split_tokens(dataset, max_tokens_per_segment=sequence_length['targets'])


def _causal_lm(stream, vocabulary):
  features = {'targets': seqio.Feature(vocabulary, add_eos=False)}
  converter = seqio.LMFeatureConverter(pack=stream.packing)
  length = stream.lengths['targets']
  lengths = {'targets': length * max(1, CHUNK // length)}
  return Recipe([append_eos, split], features, lengths, converter, longest=None, cut=length)


def _span_corruption(stream, vocabulary):
  task = stream.task
  lengths = dict(stream.lengths)
  if stream.architecture == 'decoder':
    share = objectives.encoder_share(lengths, task.noise_density, task.mean_noise_span_length)
    lengths = {'inputs': share, 'targets': lengths['targets']}
  corrupt = functools.partial(
    t5.span_corruption,
    noise_density=task.noise_density,
    mean_noise_span_length=task.mean_noise_span_length,
    # Merging would put two documents into one example, where they see each other.
    merge_examples_to_reduce_padding=False,
  )
  features = {k: seqio.Feature(vocabulary, add_eos=True) for k in ('inputs', 'targets')}
  preprocessors = [corrupt, seqio.preprocessors.append_eos_after_trim]
  return Recipe(preprocessors, features, lengths, _converter(stream))


_RECIPES = {objectives.CausalLM: _causal_lm, objectives.SpanCorruption: _span_corruption}


def task_dataset(made: Recipe, documents: list[np.ndarray], seed: int) -> tf.data.Dataset:
  """The task's examples {feature: (tokens,) int32} over `documents` (token ids without EOS)."""
  if made.longest:
    step = made.longest
    documents = [d[i : i + step] for d in documents for i in range(0, len(d), step)]

  def source(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    ends = np.cumsum([0, *map(len, documents)])
    values = np.concatenate([*documents, np.zeros(0, np.int32)])
    ragged = tf.RaggedTensor.from_row_splits(values, ends)
    return tf.data.Dataset.from_tensor_slices(ragged).map(lambda x: {'targets': x})

  task = seqio.Task(
    'isoflop',
    source=seqio.FunctionDataSource(source, splits=['train']),
    output_features=made.features,
    preprocessors=made.preprocessors,
  )
  with seqio.map_seed_manager(seed):
    return task.get_dataset(dict(made.task_lengths), 'train', shuffle=False, seed=seed)


def blocks(made: Recipe, documents: list[np.ndarray], lengths: Mapping[str, int], seed: int):
  """Model features of `documents`, shuffled, packed and converted, in blocks of rows.

  Args:
    made: the recipe.
    documents: token ids without EOS.
    lengths: tokens per packed example.
    seed: of the corruption and of the shuffle.

  Yields:
    {model feature: (rows, length) int32}.
  """
  parts = list(task_dataset(made, documents, seed).ragged_batch(BLOCK))
  columns = {}
  for key in parts[0] if parts else ():
    values = np.concatenate([p[key].values.numpy() for p in parts])
    columns[key] = values, np.concatenate([p[key].row_lengths().numpy() for p in parts])
  if made.cut:
    columns = packing.cut(columns, made.cut)
  n = len(next(iter(columns.values()))[1]) if columns else 0
  order = np.random.default_rng(seed).permutation(n)
  for i in range(0, n, BLOCK):
    chosen = packing.gather(columns, order[i : i + BLOCK])
    yield packing.convert(made.converter, chosen, lengths)
