"""seqio recipes for `research.data.objectives`: the preprocessors of t5 and seqio over tokenised documents."""

import dataclasses
import functools
from collections.abc import Mapping

import seqio
import t5.data.preprocessors as t5

from research.core.errors import Invalid
from research.data import objectives, spans
from research.data.streams import Stream
from tasks import chat, preprocessors
from tasks.files import Dropped
from tasks.recipes import Document, Part, Recipe

# The documents of a causal LM pass through seqio in chunks of about so many tokens and are cut to length later,
# because the cost of seqio is per example.
CHUNK = 8192


def recipe(stream: Stream, vocabulary: seqio.Vocabulary) -> Recipe:
  """The preprocessors and the converter of `stream`'s objective.

  An objective with a method `recipe` has that one, and a subclass of one of ours the recipe of its base.
  """
  if hasattr(stream.task, 'recipe'):
    return stream.task.recipe(stream, vocabulary)
  for kind in type(stream.task).__mro__:
    if kind in _RECIPES:
      return _RECIPES[kind](stream, vocabulary)
  why = f'{type(stream.task).__name__} needs a method recipe(stream, vocabulary): see docs/data.md.'
  raise Invalid(Stream, 'task', why)


def _two_sided(stream: Stream):
  if stream.architecture == 'encoder_decoder':
    return seqio.EncDecFeatureConverter(pack=stream.packing)
  return seqio.PrefixLMFeatureConverter(pack=stream.packing)


def _causal_lm(stream, vocabulary):
  length = stream.lengths['targets']
  part = Part(
    [preprocessors.append_eos, preprocessors.split],
    {'targets': length * max(1, CHUNK // length)},
  )
  features = {'targets': seqio.Feature(vocabulary, add_eos=False)}
  converter = seqio.LMFeatureConverter(pack=stream.packing)
  return Recipe([part], features, converter, longest=None, cut=length)


def _corruption(stream, density: float, mean_span: float, mode: str | None = None) -> Part:
  lengths = dict(stream.lengths)
  if stream.architecture == 'decoder':
    lengths['inputs'] = spans.encoder_share(lengths, density, mean_span)
  corrupt = functools.partial(
    t5.span_corruption,
    noise_density=density,
    mean_noise_span_length=mean_span,
    # Merging would put two documents into one example, where they see each other.
    merge_examples_to_reduce_padding=False,
    reserved_for_packing=1 if mode else None,
  )
  marked = [functools.partial(preprocessors.prepend_mode, mode=mode)] if mode else []
  return Part([corrupt, *marked, seqio.preprocessors.append_eos_after_trim], lengths)


def _prefix(stream, density: float, mode: str | None = None) -> Part:
  lengths = dict(stream.lengths)
  if stream.architecture == 'decoder':
    # A segment holds both sides; one token is left for the EOS below.
    lengths['inputs'] = lengths['targets'] - 1
  marked = [functools.partial(preprocessors.prepend_mode, mode=mode)] if mode else []
  unmarked = lengths | {'inputs': lengths['inputs'] - len(marked)}

  def prefix_lm(dataset, output_features):
    return t5.prefix_lm(dataset, unmarked, output_features, density)

  return Part([prefix_lm, *marked, seqio.preprocessors.append_eos_after_trim], lengths)


def _sides(stream, vocabulary, inputs_eos=True):
  return {
    'inputs': seqio.Feature(vocabulary, add_eos=inputs_eos),
    'targets': seqio.Feature(vocabulary, add_eos=True),
  }


def _span_corruption(stream, vocabulary):
  task = stream.task
  part = _corruption(stream, task.noise_density, task.mean_noise_span_length)
  return Recipe([part], _sides(stream, vocabulary), _two_sided(stream))


def _prefix_lm(stream, vocabulary):
  # On a decoder, an EOS after the prefix would show the model where the prefix ends.
  features = _sides(stream, vocabulary, inputs_eos=stream.architecture == 'encoder_decoder')
  return Recipe([_prefix(stream, stream.task.noise_density)], features, _two_sided(stream))


def _ul2(stream, vocabulary):
  parts = [
    _prefix(stream, d.noise_density, 'S')
    if d.mode == 'S'
    else _corruption(stream, d.noise_density, d.mean_noise_span_length, d.mode)
    for d in stream.task.denoisers
  ]
  rates = [d.rate for d in stream.task.denoisers]
  parts = [dataclasses.replace(p, rate=r) for p, r in zip(parts, rates, strict=True)]
  return Recipe(parts, _sides(stream, vocabulary), _two_sided(stream))


def _masked_lm(stream, vocabulary):
  task, (length,) = stream.task, stream.lengths.values()
  corrupt = functools.partial(
    preprocessors.masked_lm, noise_density=task.noise_density, whole_word=task.whole_word
  )
  part = Part(
    [preprocessors.append_eos, preprocessors.split, corrupt],
    dict.fromkeys(('inputs', 'targets', 'chosen'), length),
  )
  features = {k: seqio.Feature(vocabulary, add_eos=False) for k in ('inputs', 'targets')}
  features['chosen'] = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False)
  converter = preprocessors.MaskedLMFeatureConverter(pack=stream.packing)
  side = None if stream.architecture == 'encoder' else ('encoder_', 'decoder_')
  return Recipe([part], features, converter, longest=None, rename=side)


def _fim(stream, vocabulary):
  task = stream.task
  length = stream.lengths['targets']
  move = functools.partial(preprocessors.fill_in_the_middle, rate=task.rate, spm_rate=task.spm_rate)
  split = functools.partial(t5.split_tokens, max_tokens_per_segment=length - 4)
  part = Part([preprocessors.append_eos, split, move], {'targets': length})
  features = {'targets': seqio.Feature(vocabulary, add_eos=False)}
  converter = seqio.LMFeatureConverter(pack=stream.packing)
  return Recipe([part], features, converter, longest=None)


def _instructions(stream, vocabulary):
  decoder = stream.architecture == 'decoder'
  lengths = dict(stream.lengths)
  if decoder:
    lengths['inputs'] = lengths['targets']
  part = Part([seqio.preprocessors.append_eos], lengths)
  hide = decoder and not stream.task.bidirectional_prompt
  return Recipe(
    [part],
    _sides(stream, vocabulary, inputs_eos=not decoder),
    _two_sided(stream),
    longest=None,
    omit=('decoder_causal_attention',) if hide else (),
    select=functools.partial(_fitting_pairs, dict(stream.lengths), decoder),
  )


def _fitting_pairs(
  lengths: Mapping[str, int], decoder: bool, documents: list[Document]
) -> tuple[list[Document], Dropped]:
  """The pairs that fit a row with their EOS: both sides together in a decoder's, else each in its own."""
  fitting, dropped = [], Dropped()
  for document in documents:
    inputs, targets = len(document['inputs']), len(document['targets']) + 1  # EOS
    if decoder:
      fits = inputs + targets <= lengths['targets']
    else:
      fits = inputs + 1 <= lengths['inputs'] and targets <= lengths['targets']
    if fits:
      fitting.append(document)
    else:
      dropped['pairs longer than a row'] += 1
  return fitting, dropped


def _conversation(stream, vocabulary):
  length = stream.lengths['targets']
  features = {
    'targets': seqio.Feature(vocabulary, add_eos=False),
    'learned': seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False),
  }
  part = Part([], dict.fromkeys(features, length))
  converter = preprocessors.WeightedLMFeatureConverter(pack=stream.packing)
  encode = functools.partial(chat.encode, vocabulary, stream.task.template, length)
  return Recipe([part], features, converter, longest=None, encode=encode)


def _preferences(stream, vocabulary):
  length = stream.lengths['targets']
  features = {'targets': seqio.Feature(vocabulary, add_eos=False)}
  for name, size in (('learned', 2), ('part', 3)):
    features[name] = seqio.Feature(seqio.PassThroughVocabulary(size), add_eos=False)
  part = Part([], dict.fromkeys(features, length))
  converter = preprocessors.PreferenceFeatureConverter(pack=stream.packing)
  encode = functools.partial(chat.encode_preferences, vocabulary, stream.task.template, length)
  finish = preprocessors.answers_apart
  return Recipe([part], features, converter, longest=None, encode=encode, finish=finish)


_RECIPES = {
  objectives.Preferences: _preferences,  # and of Judgements
  objectives.Conversation: _conversation,
  objectives.CausalLM: _causal_lm,
  objectives.PrefixLM: _prefix_lm,
  objectives.SpanCorruption: _span_corruption,
  objectives.UL2: _ul2,
  objectives.MaskedLM: _masked_lm,
  objectives.FillInTheMiddle: _fim,
  objectives.Instructions: _instructions,
}
