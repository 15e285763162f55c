"""seqio preprocessors that t5 lacks, and the converter for masked language models.

All take tokenised {'targets': (tokens,) int32} datasets, and use the seeds of seqio for random numbers.
"""

from typing import ClassVar

import numpy as np
import seqio
import t5.data.preprocessors as t5
import tensorflow as tf


def mark_id(vocabulary: seqio.Vocabulary, n: int) -> int:
  """The n-th extra id from below; t5 takes its sentinels from above."""
  return vocabulary.vocab_size - vocabulary.extra_ids + n


def append_eos(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
  """EOS at the end of every document, before it is split."""
  eos = [output_features['targets'].vocabulary.eos_id]
  return dataset.map(lambda x: {**x, 'targets': tf.concat([x['targets'], eos], 0)})


def split(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Documents cut into segments of the targets' length."""
  return t5.split_tokens(dataset, max_tokens_per_segment=sequence_length['targets'])


def prepend_mode(dataset: tf.data.Dataset, output_features, mode: str) -> tf.data.Dataset:
  """UL2's mode token before the inputs."""
  token = [mark_id(output_features['targets'].vocabulary, 'RSX'.index(mode))]
  return dataset.map(lambda x: {**x, 'inputs': tf.concat([token, x['inputs']], 0)})


def word_starts(vocabulary: seqio.Vocabulary) -> list[bool]:
  """(vocab_size,): whether a token begins a word.

  A SentencePiece token does when it begins with the space mark or is no letter or digit; a byte
  when it is no ASCII letter, digit or part of a longer UTF-8 character (what follows one of those
  begins a word through `masked_lm`'s own rule).
  """
  n = vocabulary.vocab_size
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    model = vocabulary.tokenizer
    pieces = [model.id_to_piece(i) for i in range(n)]
    return [
      p.startswith('▁') or not p[:1].isalnum() or model.is_byte(i) for i, p in enumerate(pieces)
    ]
  if isinstance(vocabulary, seqio.ByteVocabulary):
    in_word = [byte >= 128 or chr(byte).isalnum() for byte in range(256)]
    return [not (3 <= i < 259 and in_word[i - 3]) for i in range(n)]
  texts = [str(vocabulary.decode([i])) for i in range(n)]
  return [not t[:1].isalnum() for t in texts]


def masked_lm(dataset, output_features, noise_density: float, whole_word: bool):
  """{'targets'} -> {'inputs', 'targets', 'chosen'}: BERT's 80% mask, 10% random, 10% unchanged."""
  vocabulary = output_features['targets'].vocabulary
  mask = mark_id(vocabulary, 0)
  first, last = 3, mask  # random replacements: every id that stands for text
  starts = tf.constant(word_starts(vocabulary)) if whole_word else None

  @seqio.map_over_dataset(num_seeds=3)
  def corrupt(x, seeds):
    tokens = x['targets']
    n = tf.size(tokens)
    draw = tf.random.stateless_uniform([n], seeds[0])
    if whole_word:
      new = tf.gather(starts, tokens)
      # A word also begins after a token that is one by itself, such as a space between bytes.
      alone = new & tf.concat([new[1:], [True]], 0)
      new = new | tf.concat([[True], alone[:-1]], 0)
      draw = tf.gather(draw, tf.cumsum(tf.cast(new, tf.int32)) - 1)
    chosen = (draw < noise_density) & (tokens != vocabulary.eos_id)
    how = tf.random.stateless_uniform([n], seeds[1])
    other = tf.random.stateless_uniform([n], seeds[2], first, last, tf.int32)
    replaced = tf.where(how < 0.8, mask, tf.where(how < 0.9, other, tokens))
    return {
      'inputs': tf.where(chosen, replaced, tokens),
      'targets': tokens,
      'chosen': tf.cast(chosen, tf.int32),
    }

  return corrupt(dataset)


def fill_in_the_middle(dataset, output_features, rate: float, spm_rate: float) -> tf.data.Dataset:
  """Moves the middle of some segments to their end, between marks; they grow by up to 4 tokens."""
  vocabulary = output_features['targets'].vocabulary
  pre, suf, mid = ([mark_id(vocabulary, i)] for i in range(3))
  eos = vocabulary.eos_id

  @seqio.map_over_dataset(num_seeds=3)
  def move(x, seeds):
    whole = x['targets']
    tokens = whole[: tf.size(whole) - tf.cast(whole[-1] == eos, tf.int32)]
    cuts = tf.random.stateless_uniform([2], seeds[0], 0, tf.size(tokens) + 1, tf.int32)
    a, b = tf.reduce_min(cuts), tf.reduce_max(cuts)
    prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
    draw = tf.random.stateless_uniform([2], seeds[1])
    psm = tf.concat([pre, prefix, suf, suffix, mid, middle, [eos]], 0)
    spm = tf.concat([pre, suf, suffix, mid, prefix, middle, [eos]], 0)
    moved = tf.where(draw[1] < spm_rate, spm, psm)
    return {'targets': tf.cond(draw[0] < rate, lambda: moved, lambda: whole)}

  return move(dataset)


_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


class WeightedLMFeatureConverter(seqio.LMFeatureConverter):
  """seqio's LMFeatureConverter with the loss where the task feature `learned` is 1."""

  TASK_FEATURES: ClassVar = dict.fromkeys(('targets', 'learned'), _SPEC)
  sets_weights: ClassVar[bool] = True

  def _convert_example(self, features):
    return super()._convert_example(features) | {'decoder_loss_weights': features['learned']}


class PreferenceFeatureConverter(WeightedLMFeatureConverter):
  """The same, and `decoder_part`: which of an example's answers a token is of, 1 or 2."""

  TASK_FEATURES: ClassVar = dict.fromkeys(('targets', 'learned', 'part'), _SPEC)

  def _convert_example(self, features):
    return super()._convert_example(features) | {'decoder_part': features['part']}


def answers_apart(rows: dict) -> dict:
  """Rows whose answers are segments of their own: 2 n - 1 and 2 n, where a pair was segment n.

  Each begins at position 0 and reads nothing of the answer before it.
  """
  rows = dict(rows)
  part = rows.pop('decoder_part')
  example = rows.get('decoder_segment_ids', np.ones_like(part))
  segments = np.where(part > 0, 2 * (example - 1) + part, 0)
  before = np.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  index = np.broadcast_to(np.arange(part.shape[1], dtype=np.int32), part.shape)
  start = np.maximum.accumulate(np.where(segments != before, index, 0), axis=1)
  filled = segments > 0
  rows['decoder_segment_ids'] = segments
  rows['decoder_positions'] = np.where(filled, index - start, 0)
  rows['decoder_input_tokens'] = np.where(index > start, rows['decoder_input_tokens'], 0)
  return rows


class MaskedLMFeatureConverter(seqio.FeatureConverter):
  """seqio's EncoderFeatureConverter with the loss on every chosen token.

  seqio's puts it where the input is the mask, and so misses the chosen tokens that BERT leaves
  unchanged or replaces by a random one. Task features: inputs, targets and chosen (0 or 1).
  """

  TASK_FEATURES: ClassVar = dict.fromkeys(('inputs', 'targets', 'chosen'), _SPEC)
  MODEL_FEATURES: ClassVar = dict.fromkeys(
    ('encoder_input_tokens', 'encoder_target_tokens', 'encoder_loss_weights'), _SPEC
  )
  PACKING_FEATURE_DTYPES: ClassVar = {
    'encoder_segment_ids': tf.int32,
    'encoder_positions': tf.int32,
  }

  def _convert_example(self, features):
    converted = {
      'encoder_input_tokens': features['inputs'],
      'encoder_target_tokens': features['targets'],
      'encoder_loss_weights': features['chosen'],
    }
    if self.pack:
      converted['encoder_segment_ids'] = features['inputs_segment_ids']
      converted['encoder_positions'] = features['inputs_positions']
    return converted

  def _convert_features(self, ds, task_feature_lengths):
    return self._pack_or_pad(ds, task_feature_lengths).map(self._convert_example)

  def get_model_feature_lengths(self, task_feature_lengths):
    names = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
    return dict.fromkeys(names, task_feature_lengths['inputs'])
