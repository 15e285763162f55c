"""Distillation: a run learns the distribution of a teacher's next token.

The teacher is another model that reads the same batches in every step. Or its likeliest tokens are computed
once and frozen beside the stream (`scores.TopTokens`).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid, did_you_mean
from research.data.mixtures import streams_of
from research.parallel.axes import shard
from research.training.cross_entropy import sum_over_tokens, token_losses
from research.training.losses import CrossEntropy, Loss, check_vocabulary
from research.training.scores import TopTokens

DIRECTIONS = ('forward', 'reverse')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Loss):
  """mix * T^2 * KL(teacher || student) + (1 - mix) * cross-entropy, with both distributions at temperature T.

  Hinton et al. (2015), arXiv:1503.02531, section 2. We use the KL divergence where they use the cross-entropy
  of the two distributions; the two differ by a constant. The reverse direction, KL(student || teacher), is that
  of MiniLLM (Gu et al. 2024, arXiv:2306.08543). The run's 'loss' is its plain cross-entropy.

  Attributes:
    teacher: a model of any family with the same vocabulary; None if the rows hold its likeliest tokens.
    temperature: both distributions are softmax(logits / temperature).
    mix: the share of the teacher's term; 1 - mix is that of the data.
    direction: 'forward' or 'reverse'.
  """

  teacher: Pretrained | None = None
  temperature: float = 1.0
  mix: float = 1.0
  direction: str = 'forward'

  reports: ClassVar[tuple[str, ...]] = ('divergence',)

  def __post_init__(self):
    # The numbers are arrays while the members of a population are traced, and an array has no truth value.
    if isinstance(self.temperature, int | float) and not self.temperature > 0:
      raise Invalid(Distillation, 'temperature', f'{self.temperature!r} must be above 0.')
    if isinstance(self.mix, int | float) and not 0 <= self.mix <= 1:
      raise Invalid(Distillation, 'mix', f'{self.mix!r} must be from 0 to 1.')
    if self.direction not in DIRECTIONS:
      hint = did_you_mean(self.direction, DIRECTIONS)
      raise Invalid(Distillation, 'direction', f'{self.direction!r} is not known.{hint}')
    if not isinstance(self.teacher, Pretrained | None):
      why = 'must be @pretrained.Pretrained() with its parentheses, or None.'
      raise Invalid(Distillation, 'teacher', why)

  @property
  def reads(self) -> tuple[str, ...]:
    return Loss.reads if self.teacher else (*Loss.reads, *TopTokens.keys)

  @property
  def evaluation(self) -> Loss:
    """Plain cross-entropy if the teacher is frozen beside the training rows: validation rows have none."""
    return self if self.teacher else CrossEntropy()

  def check(self, run, vocab: int) -> None:
    super().check(run, vocab)
    if self.teacher:
      return
    for scores in (stream.scores for stream in streams_of(run.train)):
      if scores.temperature != self.temperature:
        why = f"{self.temperature} is not the {scores.temperature} of the teacher's frozen tokens."
        raise Invalid(Distillation, 'temperature', why)
      check_vocabulary(Distillation, 'teacher', scores.model, vocab)

  def __call__(self, model, features, batch, chunks, teacher=None):
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    if teacher is None:
      teacher_values = tuple(batch[key] for key in TopTokens.keys)
      distributions = self._with_frozen
    else:
      teacher_values = (teacher.features(batch)[0],)
      readout = teacher.readout()

      def distributions(logits, features):
        return self._log_softmax(logits), self._log_softmax(readout(features))

    def sums(logits, targets, weights, *teacher_values):
      student, teacher = distributions(logits, *teacher_values)
      kl = jnp.sum(weights * self._divergence(student, teacher))
      nll = jnp.sum(weights * token_losses(logits, targets, 0.0)[0])
      return (self.mix * self.temperature**2 * kl, (1 - self.mix) * nll), (nll, kl)

    (distillation, data), (nll, kl) = sum_over_tokens(
      model.readout(),
      sums,
      features,
      batch['decoder_target_tokens'],
      weights,
      *teacher_values,
      chunks=chunks,
    )
    counts = {'weight': jnp.sum(weights), 'loss': nll, 'divergence': kl}
    return {'distillation': distillation, 'data': data}, counts

  def _log_softmax(self, logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits / self.temperature)

  def _divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns KL(p || q) per token [batch, length], of log-probabilities [batch, length, outcomes]."""
    forward = self.direction == 'forward'
    p, q = (teacher, student) if forward else (student, teacher)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

  def _with_frozen(self, logits, tokens, log_probs):
    """Returns student's and teacher's log-probabilities over the teacher's k likeliest tokens and "the rest".

    Without the outcome "the rest" the k tokens would have all of the teacher's mass, and the student would
    learn that nothing else is possible. By the chain rule of the KL divergence the result is a lower bound of
    the divergence of the whole distributions. The two are equal if the k tokens are the whole vocabulary.

    Args:
      logits: of the student, [batch, length, vocab].
      tokens: the teacher's likeliest tokens, integers [batch, length, k].
      log_probs: their log-probabilities by the teacher, [batch, length, k].
    """
    student = self._log_softmax(logits)
    # jax refuses a gather along a sharded axis, so every device takes the whole vocabulary of its tokens.
    student = shard(student, 'batch', 'length', None)
    student = jnp.take_along_axis(student, tokens, axis=-1)
    if tokens.shape[-1] == logits.shape[-1]:  # nothing is left
      return student, log_probs
    return _with_rest(student), _with_rest(log_probs)


def _with_rest(log_probs: jax.Array) -> jax.Array:
  """Appends the log-probability of all other outcomes to log-probabilities [..., k]."""
  rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
  # float32 resolves 1 to 6e-8: anything smaller than this is rounding, and can even be negative.
  log_rest = jnp.log(jnp.maximum(rest, 1e-7))
  return jnp.concatenate([log_probs, log_rest], axis=-1)
