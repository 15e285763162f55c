"""The class of a run: everything that decides its result."""

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

# These fields are not part of a run's identity: it may resume on another mesh, log more often, or have more
# evaluations.
_INCIDENTAL = ('mesh', 'log_every', 'checkpoint_every', 'keep_checkpoints', 'evaluations')
# Earlier versions lacked these fields. At their defaults they are not part of a run's identity either, so that
# the workdirs of earlier versions can be resumed.
_LATER = ('loss', 'init', 'learns')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run: everything that decides its result, and how often it reports.

  Attributes:
    model: `model(rngs=...)` returns a `LanguageModel` or an `EncoderDecoder`.
    train: the stream of training examples, or an `Experience` that generates rows as the run goes on, such as
      `reinforcement.rollouts.Rollouts`.
    validation: the stream of validation examples. The loss of a run is its loss on this whole stream.
    steps: the number of updates.
    batch_size: examples per update, over all devices.
    curriculum: (steps, batch size, cut) of the stages before `batch_size` holds: smaller batches, or rows of
      length L cut into `cut` rows of length L / cut. The step is compiled once for each stage.
    optimizer: `optimizer(learning_rate=schedule)` returns an optax transformation.
    schedule: `schedule(steps)` returns a function from the step to the learning rate.
    clip: the largest global norm of the gradient; larger gradients are scaled down to it. None for no clipping.
    loss: what is minimised: a class of `research.training.losses` or one of your own.
    init: the checkpoint that parameters start from, a `starts.Checkpoint`; None draws all from the seed.
    learns: which parameters learn, as patterns of their names ('.*/bias') or 'kind:vector'; None for all. The
      others keep their values of `init`. They need no gradient, no optimizer state and no room in checkpoints.
    microbatches: the number of parts that a batch is computed in, to save memory; the update is the same. A
      single CPU core cuts them further by itself.
    logits_chunks: the number of parts that the length is cut into for the logits; None chooses.
    seed: of the initialisation and of the order of the examples.
    mesh: the mesh of devices; None chooses data parallelism, or FSDP if the state is large.
    log_every: steps between rows of metrics.
    eval_every: steps between validations; None for one at the end.
    checkpoint_every: steps between checkpoints; None for one at the end.
    keep_checkpoints: how many of the last checkpoints are kept.
    evaluations: further evaluations, such as `evaluation.suite.Suite`; they add columns to the run's row.
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
    # gin may pass lists. As tuples they are equal to the ones that tests write.
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
    self.schedule(self.steps)  # raises if, say, the warm-up is longer than the run

  def _check_start(self):
    if self.init is not None and not isinstance(self.init, Checkpoint):
      raise Invalid(Run, 'init', 'must be @starts.Checkpoint() with its parentheses, or None.')
    if self.learns is None:
      return
    patterns = (self.learns,) if isinstance(self.learns, str) else tuple(self.learns)
    object.__setattr__(self, 'learns', patterns)
    for pattern in patterns:
      check_pattern(Run, 'learns', pattern)
    if not patterns:
      raise Invalid(Run, 'learns', '() lets no parameter learn; use None to let all of them learn.')
    if self.init is None:
      why = 'parameters that do not learn must come from a checkpoint; bind Run.init = @starts.Checkpoint().'
      raise Invalid(Run, 'learns', why)

  def _check_curriculum(self):
    for stage in self.curriculum:
      if len(stage) != 3 or not all(isinstance(n, int) and n > 0 for n in stage):
        why = f'{stage} is not (steps, batch size, cut), whole numbers above 0.'
        raise Invalid(Run, 'curriculum', why)
    steps = sum(steps for steps, _, _ in self.curriculum)
    cuts = [cut for _, _, cut in self.curriculum if cut > 1]
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
    if not all(isinstance(evaluation, Evaluation) for evaluation in self.evaluations):
      raise Invalid(Run, 'evaluations', 'must be suites: (@suite.Suite(),) with its parentheses.')
    names = [evaluation.name for evaluation in self.evaluations]
    labels = [label for evaluation in self.evaluations for label in evaluation.labels]
    for what, texts in (('are named', names), ('have a task', labels)):
      if twice := [text for text in texts if texts.count(text) > 1]:
        raise Invalid(Run, 'evaluations', f'two of them {what} {twice[0]}.')

  @property
  def batches(self) -> Curriculum:
    """The batch size, and the cut of rows, of every step."""
    return Curriculum(self.batch_size, self.curriculum)

  @property
  def target_length(self) -> int:
    """Tokens per example that the model predicts."""
    return self.train.lengths[_target(self.train.lengths)]

  @property
  def beside_tokens(self) -> dict[str, tuple]:
    """{key: (shape of a row, dtype)} of what rows hold beside tokens: scores of a model, or advantages."""
    more = self.train if isinstance(self.train, Experience) else getattr(self.train, 'scores', None)
    return more.shapes(self.target_length) if more else {}

  def identity(self) -> str:
    """Returns a text that is equal for two runs that train the same parameters."""
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
