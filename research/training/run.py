"""What a run is."""

import dataclasses
from collections.abc import Callable

from research.checkpoints.starts import Checkpoint, check_pattern
from research.core.describe import describe
from research.core.errors import Invalid
from research.data.mixtures import Curriculum, Mixture
from research.data.streams import Stream
from research.parallel.mesh import Mesh
from research.training.evaluations import Evaluation
from research.training.experience import Experience
from research.training.losses import CrossEntropy, Loss

# Two runs that differ only in these are one run: it may resume on another mesh, log more often or be
# asked more.
_INCIDENTAL = ('mesh', 'log_every', 'checkpoint_every', 'keep_checkpoints', 'evaluations')
# Fields that came later. At their defaults they are no part of a run's identity, or no workdir of before
# could be resumed.
_LATER = ('loss', 'init', 'learns')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run: everything that decides its result, and how often it reports.

  Attributes:
    model: `model(rngs=...)` makes a `LanguageModel` or an `EncoderDecoder`.
    train, validation: streams of examples; the loss of a run is its loss on all of `validation`. In the place
      of `train` may stand what makes rows as the run goes on, such as `reinforcement.rollouts.Rollouts`.
    steps: updates.
    batch_size: examples per update, over all devices.
    curriculum: (steps, batch size, cut) of stages before that: smaller batches, or every row of length L as
      `cut` rows of L / cut. The step is compiled once for each.
    optimizer: `optimizer(learning_rate=schedule)` makes an optax transformation.
    schedule: `schedule(steps)` makes a `step -> learning rate`.
    clip: gradients are scaled down to this global norm; None for no clipping.
    loss: what is minimised, a class of `research.training.losses` or one of your own.
    init: where parameters start, a `starts.Checkpoint`; None draws all of them from the seed.
    learns: which parameters learn, as patterns of their names ('.*/bias') or 'kind:vector'; None for all. The
      others stay as `init` has them, and cost neither gradient nor optimizer state nor room in checkpoints.
    microbatches: the batch is gone through in so many parts, to save memory; the update is the same. A device
      that is a single core of a CPU cuts them smaller by itself.
    logits_chunks: the length is cut into so many parts for the logits; None chooses.
    mesh: None chooses: data parallel, or FSDP where the state is large.
    seed: of the initialisation and of the order of the examples.
    eval_every: steps between evaluations; None for one at the end.
    checkpoint_every: steps between checkpoints; None for one at the end.
    evaluations: what else is asked of the run, such as `evaluation.suite.Suite`: columns of its row.
  """

  model: Callable
  train: Stream | Mixture | Experience
  validation: Stream | Mixture
  steps: int
  batch_size: int
  curriculum: tuple[tuple[int, int, int], ...] = ()
  optimizer: Callable
  schedule: Callable
  clip: float | None = 1.0
  loss: Loss = dataclasses.field(default_factory=CrossEntropy)
  init: Checkpoint | None = None
  learns: tuple[str, ...] | None = None
  microbatches: int = 1
  logits_chunks: int | None = None
  seed: int = 0
  mesh: Mesh | None = None
  log_every: int = 10
  eval_every: int | None = None
  checkpoint_every: int | None = None
  keep_checkpoints: int = 2
  evaluations: tuple[Evaluation, ...] = ()

  def __post_init__(self):
    positive = ('steps', 'batch_size', 'microbatches', 'log_every', 'keep_checkpoints')
    optional = ('logits_chunks', 'eval_every', 'checkpoint_every')
    for field in (*positive, *optional):
      value = getattr(self, field)
      if value is None and field in optional:
        continue
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Invalid(Run, field, f'{value!r} must be a positive whole number.')
    kinds = {'train': Stream | Mixture | Experience, 'validation': Stream | Mixture}
    for field, kind in kinds.items():
      if not isinstance(getattr(self, field), kind):
        raise Invalid(Run, field, 'must be a stream: @streams.Stream() with its parentheses.')
    if not isinstance(self.loss, Loss):
      raise Invalid(Run, 'loss', 'must be a loss: @losses.CrossEntropy() with its parentheses.')
    self._check_start()
    if self.clip is not None and not self.clip > 0:
      raise Invalid(Run, 'clip', f'{self.clip!r} must be positive, or None.')
    object.__setattr__(self, 'curriculum', tuple(map(tuple, self.curriculum)))
    self._check_curriculum()
    object.__setattr__(self, 'evaluations', tuple(self.evaluations))
    self._check_evaluations()
    for size, cut in self.batches.sizes():
      if size * cut % self.microbatches:
        why = f'{self.microbatches} does not divide the batch of {size * cut}.'
        raise Invalid(Run, 'microbatches', why)
      length = self.target_length // cut
      if self.logits_chunks and length % self.logits_chunks:
        why = f'{self.logits_chunks} does not divide the length {length}.'
        raise Invalid(Run, 'logits_chunks', why)
    self.schedule(self.steps)  # a warm-up longer than the run is an error now

  def _check_start(self):
    if self.init is not None and not isinstance(self.init, Checkpoint):
      raise Invalid(Run, 'init', 'must be a start: @starts.Checkpoint() with its parentheses.')
    if self.learns is None:
      return
    patterns = (self.learns,) if isinstance(self.learns, str) else tuple(self.learns)
    object.__setattr__(self, 'learns', patterns)
    for pattern in patterns:
      check_pattern(Run, 'learns', pattern)
    if not patterns:
      raise Invalid(Run, 'learns', '() lets nothing learn; None lets all parameters learn.')
    if self.init is None:
      why = 'what does not learn must come from a checkpoint; bind Run.init = @starts.Checkpoint().'
      raise Invalid(Run, 'learns', why)

  def _check_curriculum(self):
    for stage in self.curriculum:
      if len(stage) != 3 or not all(isinstance(n, int) and n > 0 for n in stage):
        why = f'{stage} is not (steps, batch size, cut), whole numbers above 0.'
        raise Invalid(Run, 'curriculum', why)
    steps, cuts = sum(s[0] for s in self.curriculum), [s[2] for s in self.curriculum if s[2] > 1]
    if steps > self.steps:
      raise Invalid(
        Run, 'curriculum', f'its {steps} steps are more than the {self.steps} of the run.'
      )
    if cuts and len(self.train.lengths) > 1:
      raise Invalid(Run, 'curriculum', 'rows of an encoder-decoder cannot be cut; let cut be 1.')
    for cut in cuts:
      if self.target_length % cut or self.target_length // cut < 2:
        why = f'the length {self.target_length} cannot be cut into {cut} parts of 2 tokens or more.'
        raise Invalid(Run, 'curriculum', why)

  def _check_evaluations(self):
    if not all(isinstance(one, Evaluation) for one in self.evaluations):
      raise Invalid(Run, 'evaluations', 'must be suites: (@suite.Suite(),) with its parentheses.')
    names = [one.name for one in self.evaluations]
    labels = [label for one in self.evaluations for label in one.labels]
    for what, texts in (('are named', names), ('have a task', labels)):
      if twice := [text for text in texts if texts.count(text) > 1]:
        raise Invalid(Run, 'evaluations', f'two of them {what} {twice[0]}.')

  @property
  def batches(self) -> Curriculum:
    """Which examples each step takes."""
    return Curriculum(self.batch_size, self.curriculum)

  @property
  def target_length(self) -> int:
    """Tokens per example that the logits are made for."""
    return self.train.lengths[_target(self.train.lengths)]

  @property
  def beside_tokens(self) -> dict[str, tuple]:
    """{key: (shape of a row, dtype)} of what rows hold beside tokens: a model's scores, advantages."""
    more = self.train if isinstance(self.train, Experience) else getattr(self.train, 'scores', None)
    return more.shapes(self.target_length) if more else {}

  def identity(self) -> str:
    """The text that is equal for two runs that train the same parameters."""
    lines = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      default = field.default_factory() if callable(field.default_factory) else field.default
      if field.name in _INCIDENTAL or (field.name in _LATER and value == default):
        continue
      lines.append(f'{field.name} = {describe(value, 1)}\n')
    return ''.join(lines)


def _target(lengths: dict) -> str:
  return 'targets' if 'targets' in lengths else 'inputs'
