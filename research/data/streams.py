"""Data streams: a frozen dataclass that checks itself and imports nothing heavy.

    Stream = objective x corpus x vocabulary x lengths

`research.freeze` turns a `Stream` into files, and `research.data.batches` reads them. `Stream.key()` names
the files.
"""

import dataclasses
import importlib.util

from research.core.errors import Invalid, did_you_mean
from research.data import corpora, objectives, vocabularies
from research.data.objective import READS, Objective
from research.data.scores import Scores
from research.data.spec import digest, outside_code, to_spec

# Part of every key. Raise it when a change gives the same corpus or stream other bytes on disk.
FORMAT = 3

ARCHITECTURES = ('decoder', 'encoder_decoder', 'encoder')


@dataclasses.dataclass(frozen=True)
class Stream:
  """Fixed-shape training or evaluation examples, a pure function of these fields and the corpus.

  Attributes:
    task: an objective of `research.data.objectives` (or its short name, such as 'causal_lm'), built over
      `corpus` and `vocabulary`; or the name of any seqio Task or Mixture that `module` registers.
    lengths: tokens per example, by seqio task feature. A decoder has one length, 'targets', which
      also holds its prefix; an encoder-decoder has 'inputs' and 'targets'; an encoder has 'inputs'.
      With a registered task these are seqio's task_feature_lengths, unchanged.
    corpus: where the text comes from (a registered task has its own).
    vocabulary: how text becomes tokens (a registered task has its own).
    split: 'train' or 'validation', or a registered task's own.
    examples: freeze at most so many packed examples; None freezes the whole split.
    passes: how many times to freeze the corpus, each time with other random corruption. Epoch e of training
      reads pass e modulo `passes`.
    packing: whether an example holds several short documents, separated by segment ids.
    architecture: 'decoder', 'encoder_decoder' or 'encoder'; None is the objective's first.
    seed: of the shuffling and of the corruption.
    module: Python module to import before looking `task` up in seqio's registries.
    scores: what a model says of the examples, frozen beside them (`research.training.scores`).
    source_shards: whether a registered task is read shard by shard of its source, each of which is then
      preprocessed, shuffled and packed alone, as if it were the data of one host of T5X. Several processes can
      freeze such a task.
  """

  task: 'str | Objective' = 'causal_lm'
  lengths: dict[str, int] = dataclasses.field(default_factory=lambda: {'targets': 512})
  corpus: corpora.Corpus = dataclasses.field(default_factory=corpora.PythonSources)
  vocabulary: vocabularies.Vocabulary = dataclasses.field(default_factory=vocabularies.Bytes)
  split: str = 'train'
  examples: int | None = None
  passes: int = 1
  packing: bool = True
  architecture: str | None = None
  seed: int = 0
  module: str | None = None
  scores: Scores | None = None
  source_shards: bool = False

  def __post_init__(self):
    if isinstance(self.task, str) and self.task in objectives.OBJECTIVES:
      object.__setattr__(self, 'task', objectives.OBJECTIVES[self.task]())
    object.__setattr__(self, 'lengths', dict(self.lengths))
    self._check_numbers()
    if self.registered:
      self._check_registered()
    else:
      self._check_described()

  @property
  def registered(self) -> bool:
    """Whether `task` names a seqio Task or Mixture that `module` registers."""
    return isinstance(self.task, str)

  @property
  def name(self) -> str:
    return self.task if self.registered else self.task.name

  def _check_numbers(self):
    if not isinstance(self.scores, Scores | None):
      raise Invalid(Stream, 'scores', 'must be such as @scores.TopTokens() with its parentheses.')
    for key, n in self.lengths.items():
      if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise Invalid(Stream, 'lengths', f'{key!r} is {n!r}, and must be a whole number above 1.')
    if self.examples is not None and (not isinstance(self.examples, int) or self.examples < 1):
      raise Invalid(Stream, 'examples', f'{self.examples!r} must be a positive number, or None.')
    if not isinstance(self.passes, int) or self.passes < 1:
      raise Invalid(Stream, 'passes', f'{self.passes!r} must be a positive number.')
    if self.architecture not in (None, *ARCHITECTURES):
      hint = did_you_mean(self.architecture, ARCHITECTURES)
      raise Invalid(Stream, 'architecture', f'{self.architecture!r} is not known.{hint}')

  def _check_registered(self):
    if self.architecture == 'encoder':
      why = 'a registered task runs as a decoder or an encoder_decoder.'
      raise Invalid(Stream, 'architecture', why)
    if self.module is None:
      raise Invalid(
        Stream,
        'task',
        f'{self.task!r} is not an objective.{did_you_mean(self.task, objectives.OBJECTIVES)} '
        'If it is a seqio task, set Stream.module to the module that registers it.',
      )
    try:
      exists = importlib.util.find_spec(self.module) is not None
    except (ImportError, ValueError):
      exists = False
    if not exists:
      raise Invalid(
        Stream, 'module', f'there is no Python module {self.module!r}: is its folder in PYTHONPATH?'
      )

  def _check_described(self):
    if self.source_shards:
      why = 'is for a registered seqio task; a corpus is read in parts without it.'
      raise Invalid(Stream, 'source_shards', why)
    if not isinstance(self.task, Objective):
      raise Invalid(Stream, 'task', f'{self.task!r} is neither an objective nor the name of one.')
    if not isinstance(self.corpus, corpora.Corpus):
      raise Invalid(Stream, 'corpus', f'{self.corpus!r} is not a corpus, such as PythonSources().')
    if not isinstance(self.vocabulary, vocabularies.Vocabulary):
      raise Invalid(Stream, 'vocabulary', f'{self.vocabulary!r} is not a vocabulary: try Bytes().')
    if self.split not in corpora.SPLITS:
      hint = did_you_mean(self.split, corpora.SPLITS)
      raise Invalid(Stream, 'split', f'{self.split!r} is not a split.{hint}')
    architecture = self.architecture or self.task.architectures[0]
    object.__setattr__(self, 'architecture', architecture)
    if architecture not in self.task.architectures:
      why = f'{self.name} runs as {" or ".join(self.task.architectures)}, not as {architecture}.'
      raise Invalid(Stream, 'architecture', why)
    if self.task.reads != self.corpus.gives:
      needs = READS[self.task.reads]
      has = READS[self.corpus.gives]
      raise Invalid(Stream, 'corpus', f'{self.name} needs {needs}, and this corpus gives {has}.')
    sides = {
      'decoder': ['targets'],
      'encoder': ['inputs'],
      'encoder_decoder': ['inputs', 'targets'],
    }
    features = sides[architecture]
    if architecture == 'encoder_decoder' and set(self.lengths) == {'inputs'}:
      targets = self.task.targets_length(self.lengths['inputs'])
      if targets:
        self.lengths['targets'] = targets
    if sorted(self.lengths) != features:
      why = f'{self.name} on a {architecture} needs exactly {features}, not {sorted(self.lengths)}.'
      raise Invalid(Stream, 'lengths', why)
    self.task.check(self)

  def described(self) -> dict:
    """Returns the fields in a run's identity; those that earlier versions lacked only if they are set."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    if self.scores is None:
      del fields['scores']
    if not self.source_shards:
      del fields['source_shards']
    return fields

  def spec(self) -> dict:
    """Returns a dict of JSON values, from which `from_spec` makes an equal stream without scores."""
    spec = to_spec(self.unscored)
    del spec['scores']  # the frozen text does not depend on them
    if not self.source_shards:
      del spec['source_shards']  # so that streams of earlier versions keep their names
    return spec

  @property
  def unscored(self) -> 'Stream':
    """The stream without its scores."""
    return dataclasses.replace(self, scores=None) if self.scores else self

  def key(self) -> str:
    """Returns the name of the frozen files. Streams that differ only in `examples` share them."""
    spec = self.spec() | {'examples': None}
    if self.registered:
      # A registered task reads neither.
      spec |= {'corpus': None, 'vocabulary': None}
    else:
      spec['signature'] = self.corpus.signature()
      spec['vocabulary_signature'] = self.vocabulary.signature()
      if signature := self.task.signature():
        spec['task_signature'] = signature
      if code := outside_code(spec):
        spec['code'] = code
    return f'{self.name}-{self.split}-{digest([FORMAT, spec])}'.replace('/', '_').replace(':', '_')
