"""The base class of objectives, for those in `objectives` and for your own."""

import dataclasses
from typing import ClassVar

from research.core.errors import Invalid

# The kinds of documents that a corpus can have, in words for messages.
READS = {
  'text': 'plain text',
  'pairs': 'pairs of prompt and completion (JsonLines with prompt=...)',
  'conversations': 'conversations (corpora.Conversations)',
  'preferences': 'preferences (corpora.PreferencePairs)',
  'judgements': 'judgements (corpora.JudgedAnswers)',
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """Base class of objectives.

  Class attributes:
    name: the short name that `Stream.task` takes.
    architectures: the models that it can feed, the usual one first.
    reads: the kind of documents that it needs, a key of `READS`; a corpus of another kind is an error.
    random: whether a second pass over the corpus differs from the first.
    prefixed: whether the rows of a decoder have a prefix with bidirectional attention
      (`decoder_causal_attention`).
    mark_names: names to print for the lowest extra ids, which the objective uses as marks.

  To add one, write a subclass in a module that the gin file imports, with a method
  `recipe(stream, vocabulary)` that returns a `tasks.recipes.Recipe`. A subclass of one of those in
  `objectives` inherits its recipe.
  """

  name: ClassVar[str]
  architectures: ClassVar[tuple[str, ...]] = ('decoder',)
  reads: ClassVar[str] = 'text'
  random: ClassVar[bool] = True
  prefixed: ClassVar[bool] = False
  mark_names: ClassVar[tuple[str, ...]] = ()

  def signature(self) -> list:
    """Returns what decides the examples besides these fields (a template's text), for the key of the cache."""
    return []

  def targets_length(self, inputs: int) -> int | None:
    """Returns the length of targets that suits inputs of this length without waste; None if there is none."""
    del inputs

  def check(self, stream) -> None:
    """Raises `Invalid` if the lengths or the vocabulary of a stream do not suit this objective."""
    if stream.passes > 1 and not self.random:
      raise Invalid(
        type(stream),
        'passes',
        f'{self.name} is not random, so every pass would be the same: set it to 1.',
      )
