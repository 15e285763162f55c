"""Checks that the lengths and the vocabulary of a stream suit its objective."""

from research.core.errors import Invalid
from research.data.spans import encoder_share, span_lengths


def check_spans(stream, density, mean_span, reserved=0, owner=None):
  """Raises `Invalid` if this corruption needs longer targets or more sentinels.

  Args:
    stream: the stream.
    density: the fraction of tokens that spans replace.
    mean_span: mean tokens per span.
    reserved: tokens of the inputs that are not text, such as a mode token.
    owner: the class that messages name; None for that of the objective.
  """
  owner = owner or type(stream.task)
  if not 0 < density < 1:
    raise Invalid(owner, 'noise_density', f'{density} must lie between 0 and 1.')
  if mean_span < 1:
    raise Invalid(owner, 'mean_noise_span_length', f'{mean_span} must be at least 1.')
  joint = stream.architecture == 'decoder'
  inputs = encoder_share(stream.lengths, density, mean_span) if joint else stream.lengths['inputs']
  n, targets = span_lengths(inputs - reserved, density, mean_span)
  if not joint and stream.lengths['targets'] < targets:
    why = f"'targets' is {stream.lengths['targets']}, and {stream.name} with 'inputs' of {inputs} "
    raise Invalid(type(stream), 'lengths', why + f'needs {targets}.')
  spans = max(1, round(round(n * density) / mean_span))
  if stream.vocabulary.extra_ids - len(stream.task.mark_names) < spans:
    why = f'{stream.vocabulary.extra_ids} sentinels are too few: this corruption uses {spans} '
    why += f'(and {len(stream.task.mark_names)} ids are mode tokens).'
    raise Invalid(type(stream.vocabulary), 'extra_ids', why)


def check_targets_hold_inputs(stream):
  """Raises `Invalid` if the targets of an encoder-decoder are shorter than its inputs."""
  lengths = stream.lengths
  if stream.architecture == 'encoder_decoder' and lengths['targets'] < lengths['inputs']:
    why = (
      f"'targets' is {lengths['targets']}: {stream.name} can move all of 'inputs' to the targets, "
    )
    raise Invalid(type(stream), 'lengths', why + f'so make it {lengths["inputs"]}.')


def check_marks(stream):
  """Raises `Invalid` if the vocabulary has too few extra ids for the marks of the objective."""
  marks = len(stream.task.mark_names)
  if stream.vocabulary.extra_ids < marks:
    why = (
      f'{stream.vocabulary.extra_ids} is too few: {stream.name} needs {marks} ids for its marks.'
    )
    raise Invalid(type(stream.vocabulary), 'extra_ids', why)
