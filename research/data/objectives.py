"""Objectives: which tokens a model sees, and which it must predict.

They are dataclasses. `tasks.objectives` turns them into seqio preprocessors in the freezing process; this
module never imports TensorFlow.
"""

import dataclasses
import hashlib
import pathlib
from typing import ClassVar

from research.core.errors import Invalid
from research.data.objective import Objective
from research.data.objective_checks import check_marks, check_spans, check_targets_hold_inputs
from research.data.spans import span_lengths


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
  """Predict every token from the tokens before it in its document. EOS ends each document."""

  name: ClassVar[str] = 'causal_lm'
  random: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
  """Predict the spans that sentinels replace (T5; Raffel et al. 2020, section 3.1.4).

  Attributes:
    noise_density: the fraction of tokens to replace.
    mean_noise_span_length: mean tokens per replaced span.
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
  """Predict the rest of a segment from a prefix of random length with bidirectional attention.

  Raffel et al. (2020), section 3.2.3; Liu et al. (2018), arXiv:1801.10198.

  Attributes:
    noise_density: the mean fraction of tokens to predict, at most one half.
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
  """One denoiser of UL2: `mode` 'R' or 'X' (span corruption) or 'S' (prefix LM), and its relative `rate`."""

  mode: str
  mean_noise_span_length: float
  noise_density: float
  rate: float = 1.0

  def __post_init__(self):
    if self.mode not in ('R', 'S', 'X'):
      raise Invalid(Denoiser, 'mode', f"{self.mode!r} is not 'R', 'S' or 'X'.")
    if self.rate <= 0:
      raise Invalid(Denoiser, 'rate', f'{self.rate} must be positive.')


@dataclasses.dataclass(frozen=True)
class UL2(Objective):
  """A mixture of denoisers, each announced by a mode token (Tay et al. 2022, arXiv:2205.05131).

  The defaults are the seven of its table 1: R (mean spans of 3 and 8 at 15%), X (3, 8 and 64 at 50%, and 64
  at 15%) and S (predicts a quarter on average). The mode tokens are the three lowest extra ids: R, S, X.
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

  Of the chosen tokens 80% become the mask (the lowest extra id), 10% a random token, and 10% stay. With the
  architecture 'decoder', features have the names that a model of one stack reads (decoder_input_tokens, ...),
  with inputs that are not shifted; with 'encoder', they have seqio's names (encoder_input_tokens, ...).

  Attributes:
    noise_density: the probability that a token (or word) is chosen.
    whole_word: whether to choose all tokens of a word together.
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
  """Causal LM that moves the middle of some segments to their end.

  Bavarian et al. (2022), arXiv:2207.14255, at the level of the context and with cuts at token positions, in
  the order prefix-suffix-middle (PSM) or suffix-prefix-middle (SPM, variant 2). The marks <PRE>, <SUF>, <MID>
  are the three lowest extra ids. All tokens carry loss.

  Attributes:
    rate: the fraction of segments to rearrange.
    spm_rate: the fraction of these to put in SPM order.
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
  """Predict a completion from its prompt, which carries no loss. Drops pairs that do not fit.

  Attributes:
    bidirectional_prompt: on a decoder, whether attention within the prompt is bidirectional.
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
  """Predict the assistant's turns of a conversation. The other turns carry no loss.

  A conversation longer than a row loses whole turns at its end, so that its last turn is the assistant's. One
  whose first exchange is longer than a row is left out. Both are counted and reported with file and line.

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
      raise Invalid(type(self), 'template', f'there is no file {self.template!r}.')


@dataclasses.dataclass(frozen=True)
class Preferences(Conversation):
  """Pairs of a chosen and a rejected answer to the same prompt, side by side in a row.

  Segments 1 and 2 of a row are a chosen answer and the rejected one, 3 and 4 the next pair, and so on. Each has
  the prompt before it, and only the answer carries loss. A pair is in one row, so that no microbatch separates
  it. A pair that is longer than a row is left out; such pairs are counted and reported with file and line.
  """

  name: ClassVar[str] = 'preferences'
  reads: ClassVar[str] = 'preferences'


@dataclasses.dataclass(frozen=True)
class Judgements(Preferences):
  """Answers that were judged one by one: segments with odd numbers are good answers, those with even numbers
  bad.

  The n-th answer of a row is segment 2 n - 1 or 2 n. All else is as for `Preferences`.
  """

  name: ClassVar[str] = 'judgements'
  reads: ClassVar[str] = 'judgements'


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
    Preferences,
    Judgements,
  )
}
