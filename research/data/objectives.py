"""Which tokens a model sees and which it must predict: the objectives, as plain dataclasses.

Each is the description alone. `tasks.objectives` makes seqio preprocessors of it, in the process that
freezes a stream; nothing here imports TensorFlow.
"""

import dataclasses
import hashlib
import pathlib
from typing import ClassVar

from research.core.errors import Invalid
from research.data.objective_checks import check_marks, check_spans, check_targets_hold_inputs
from research.data.spans import span_lengths

# What a corpus can give, in words for messages.
READS = {
  'text': 'plain text',
  'pairs': 'pairs of prompt and completion (JsonLines with prompt=...)',
  'conversations': 'conversations (corpora.Conversations)',
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """Base of the objectives.

  Class attributes:
    name: the short name that `Stream.task` takes.
    architectures: which models it can feed, its usual one first.
    reads: what it is made of, one of `READS`: a corpus that gives something else is refused.
    random: whether a second pass over the corpus differs from the first.
    prefixed: whether the rows of a decoder have a prefix that sees itself both ways
      (`decoder_causal_attention`).
    mark_names: names of the ids that it takes from the lowest extra ids, for a reader.

  An objective of your own is a subclass in a module that the gin file imports; its method
  `recipe(stream, vocabulary)` returns a `tasks.objectives.Recipe`. A subclass of one of these inherits
  its recipe.
  """

  name: ClassVar[str]
  architectures: ClassVar[tuple[str, ...]] = ('decoder',)
  reads: ClassVar[str] = 'text'
  random: ClassVar[bool] = True
  prefixed: ClassVar[bool] = False
  mark_names: ClassVar[tuple[str, ...]] = ()

  def signature(self) -> list:
    """What outside these fields decides the examples (a template's text), for the cache's key."""
    return []

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
  prefixed: ClassVar[bool] = True

  def targets_length(self, inputs: int) -> int:
    return span_lengths(inputs, self.noise_density, self.mean_noise_span_length)[1]

  def check(self, stream):
    super().check(stream)
    check_spans(stream, self.noise_density, self.mean_noise_span_length)


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
  """Predict the rest of a segment from a prefix of random length that sees itself both ways.

  Raffel et al. (2020), section 3.2.3; Liu et al. (2018), arXiv:1801.10198.

  Attributes:
    noise_density: the share of tokens that is predicted, on average; at most one half.
  """

  noise_density: float = 0.5

  name: ClassVar[str] = 'prefix_lm'
  architectures: ClassVar[tuple[str, ...]] = ('decoder', 'encoder_decoder')
  prefixed: ClassVar[bool] = True

  def targets_length(self, inputs: int) -> int:
    return inputs

  def check(self, stream):
    super().check(stream)
    if not 0 < self.noise_density <= 0.5:
      raise Invalid(
        PrefixLM, 'noise_density', f'{self.noise_density} must be above 0, at most 0.5.'
      )
    check_targets_hold_inputs(stream)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """One of UL2's: `mode` 'R', 'X' (span corruption) or 'S' (prefix LM), and its share of the tokens."""

  mode: str
  mean_noise_span_length: float
  noise_density: float
  rate: float = 1.0

  def __post_init__(self):
    if self.mode not in ('R', 'S', 'X'):
      raise Invalid(Denoiser, 'mode', f"{self.mode!r} is none of 'R', 'S' and 'X'.")
    if self.rate <= 0:
      raise Invalid(Denoiser, 'rate', f'{self.rate} must be positive.')


@dataclasses.dataclass(frozen=True)
class UL2(Objective):
  """A mixture of denoisers, each announced by a mode token (Tay et al. 2022, arXiv:2205.05131).

  The default seven are those of its table 1: R (mean 3 and 8 at 15%), X (3, 8, 64 at 50% and 64 at
  15%), S (a quarter predicted, on average). The mode tokens are the three lowest extra ids: R, S, X.
  """

  denoisers: tuple[Denoiser, ...] = (
    Denoiser('R', 3, 0.15),
    Denoiser('R', 8, 0.15),
    Denoiser('S', 0, 0.25),
    Denoiser('X', 3, 0.5),
    Denoiser('X', 8, 0.5),
    Denoiser('X', 64, 0.15),
    Denoiser('X', 64, 0.5),
  )

  name: ClassVar[str] = 'ul2'
  architectures: ClassVar[tuple[str, ...]] = ('encoder_decoder', 'decoder')
  mark_names: ClassVar[tuple[str, ...]] = ('[R]', '[S]', '[X]')
  prefixed: ClassVar[bool] = True

  def __post_init__(self):
    object.__setattr__(self, 'denoisers', tuple(self.denoisers))

  def targets_length(self, inputs: int) -> int:
    return inputs

  def check(self, stream):
    super().check(stream)
    check_targets_hold_inputs(stream)
    for d in self.denoisers:
      if d.mode != 'S':
        check_spans(stream, d.noise_density, d.mean_noise_span_length, 1, Denoiser)


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
  """Predict chosen tokens in place: BERT (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

  Of the chosen tokens 80% become the mask (the lowest extra id), 10% a random token, 10% stay. As a
  'decoder' the features have the names that a model of one stack reads (decoder_input_tokens, ...; the
  inputs are not shifted); as an 'encoder' they have seqio's (encoder_input_tokens, ...).

  Attributes:
    noise_density: the chance of a token (or word) to be chosen.
    whole_word: whether the tokens of a word are chosen together.
  """

  noise_density: float = 0.15
  whole_word: bool = False

  name: ClassVar[str] = 'masked_lm'
  architectures: ClassVar[tuple[str, ...]] = ('decoder', 'encoder')
  mark_names: ClassVar[tuple[str, ...]] = ('<mask>',)

  def check(self, stream):
    super().check(stream)
    check_marks(stream)
    if not 0 < self.noise_density < 1:
      raise Invalid(MaskedLM, 'noise_density', f'{self.noise_density} must lie between 0 and 1.')


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Objective):
  """Causal LM in which a share of the segments has its middle moved to the end.

  Bavarian et al. (2022), arXiv:2207.14255: at the level of the context, cut at token positions; in
  the order prefix-suffix-middle (PSM) or suffix-prefix-middle (SPM, variant 2). The marks <PRE>,
  <SUF>, <MID> are the three lowest extra ids; the loss is on all tokens.

  Attributes:
    rate: the share of segments that is rearranged.
    spm_rate: the share of those that is in SPM order.
  """

  rate: float = 0.5
  spm_rate: float = 0.5

  name: ClassVar[str] = 'fim'
  mark_names: ClassVar[tuple[str, ...]] = ('<PRE>', '<SUF>', '<MID>')

  def check(self, stream):
    super().check(stream)
    check_marks(stream)
    for field in ('rate', 'spm_rate'):
      if not 0 <= getattr(self, field) <= 1:
        raise Invalid(FillInTheMiddle, field, f'{getattr(self, field)} must be from 0 to 1.')
    if stream.lengths['targets'] < 16:
      raise Invalid(type(stream), 'lengths', "'targets' must be at least 16 for fim.")


@dataclasses.dataclass(frozen=True)
class Instructions(Objective):
  """Predict a completion from its prompt; the prompt carries no loss. Pairs that do not fit are dropped.

  Attributes:
    bidirectional_prompt: on a decoder, whether the prompt's tokens see each other both ways.
  """

  bidirectional_prompt: bool = False

  name: ClassVar[str] = 'instructions'
  architectures: ClassVar[tuple[str, ...]] = ('decoder', 'encoder_decoder')
  reads: ClassVar[str] = 'pairs'
  random: ClassVar[bool] = False

  @property
  def prefixed(self) -> bool:
    return self.bidirectional_prompt


@dataclasses.dataclass(frozen=True)
class Conversation(Objective):
  """Predict the assistant's turns of a conversation; all other turns carry no loss.

  A conversation longer than a row loses its last turns, whole ones, so that it ends with an assistant's turn;
  one whose first exchange is longer is left out. Both are counted and told with file and line.

  Attributes:
    template: a tokenizer_config.json with a chat_template, or a file with a jinja2 template; None is
      `research.data.conversations.render_plain`.
  """

  template: str | None = None

  name: ClassVar[str] = 'conversation'
  reads: ClassVar[str] = 'conversations'
  random: ClassVar[bool] = False

  def signature(self) -> list:
    if self.template is None:
      return []
    return [hashlib.sha256(pathlib.Path(self.template).expanduser().read_bytes()).hexdigest()[:16]]

  def check(self, stream):
    super().check(stream)
    if self.template is not None and not pathlib.Path(self.template).expanduser().is_file():
      raise Invalid(Conversation, 'template', f'there is no file {self.template!r}.')


# The short names that `Stream.task` takes.
OBJECTIVES = {
  c.name: c
  for c in (
    CausalLM,
    PrefixLM,
    SpanCorruption,
    UL2,
    MaskedLM,
    FillInTheMiddle,
    Instructions,
    Conversation,
  )
}
