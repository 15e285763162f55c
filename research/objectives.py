"""Which tokens a model sees and which it must predict: the objectives, as plain dataclasses.

Each is the description alone. `tasks.objectives` makes seqio preprocessors of it, in the process that
freezes a stream; nothing here imports TensorFlow.
"""

import dataclasses
from typing import ClassVar

from research.errors import Invalid


@dataclasses.dataclass(frozen=True)
class Objective:
  """Base of the objectives.

  Class attributes:
    name: the short name that `Stream.task` takes.
    architectures: which models it can feed, its usual one first.
    pairs: whether it reads prompt-completion pairs instead of plain text.
    random: whether a second pass over the corpus differs from the first.
  """

  name: ClassVar[str]
  architectures: ClassVar[tuple[str, ...]] = ('decoder',)
  pairs: ClassVar[bool] = False
  random: ClassVar[bool] = True

  def targets_length(self, inputs: int) -> int | None:
    """The targets' length that wastes nothing for this inputs' length, where there is one."""
    del inputs

  def check(self, stream) -> None:
    """Raises `Invalid` when the stream's lengths or vocabulary cannot serve this objective."""
    if stream.passes > 1 and not self.random:
      raise Invalid(type(stream), 'passes', f'{self.name} has no randomness: every pass is equal.')


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
  """Predict every token from the ones before it, document by document; EOS ends a document."""

  name: ClassVar[str] = 'causal_lm'
  random: ClassVar[bool] = False


def span_lengths(inputs: int, density: float, mean_span: float) -> tuple[int, int]:
  """How much text one span-corruption example takes.

  Raffel et al. (2020), arXiv:1910.10683, section 3.1.4: of n tokens, round(n density) are noise, in
  spans of `mean_span` on average; each span costs one sentinel on either side, and both sides end in
  EOS. Returns (n, length of the targets) for the largest n whose inputs fit into `inputs` tokens.
  """

  def lengths(n):
    noise = round(n * density)
    spans = round(noise / mean_span)
    return n - noise + spans + 1, noise + spans + 1

  n = inputs - 1
  while lengths(n + 1)[0] <= inputs:
    n += 1
  got, targets = lengths(n)
  # At a density of one half the two sides are meant to be equally long.
  return (n - 1, targets - 1) if density == 0.5 and targets > got else (n, targets)


def check_spans(stream, density, mean_span, reserved=0, owner=None):
  """Raises `Invalid` unless the lengths and the sentinels suffice for this corruption."""
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
  if stream.vocabulary.extra_ids - reserved_ids(stream.task) < spans:
    why = f'{stream.vocabulary.extra_ids} sentinels are too few: this corruption uses {spans} '
    why += f'(and {reserved_ids(stream.task)} ids are mode tokens).'
    raise Invalid(type(stream.vocabulary), 'extra_ids', why)


def encoder_share(lengths, density, mean_span) -> int:
  """For a decoder of `lengths['targets']` tokens: the largest inputs whose two sides fit together."""
  total = lengths['targets']
  inputs = total
  while inputs > 2 and inputs + span_lengths(inputs, density, mean_span)[1] > total:
    inputs -= 1
  return inputs


def reserved_ids(task) -> int:
  """Extra ids that are not sentinels: UL2's mode tokens, fill-in-the-middle's marks."""
  return getattr(task, 'marks', 0)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
  """Predict the spans that sentinels stand for (T5; Raffel et al. 2020, section 3.1.4).

  Attributes:
    noise_density: the share of tokens that is hidden.
    mean_noise_span_length: tokens per hidden span, on average.
  """

  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0

  name: ClassVar[str] = 'span_corruption'
  architectures: ClassVar[tuple[str, ...]] = ('encoder_decoder', 'decoder')

  def targets_length(self, inputs: int) -> int:
    return span_lengths(inputs, self.noise_density, self.mean_noise_span_length)[1]

  def check(self, stream):
    super().check(stream)
    check_spans(stream, self.noise_density, self.mean_noise_span_length)


OBJECTIVES = {c.name: c for c in (CausalLM, SpanCorruption)}
