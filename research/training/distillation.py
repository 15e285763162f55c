"""Distillation: a run learns the distribution of a teacher's next token.

The teacher is another model, which reads the same batches in every step, or what it said of them once, frozen
beside the stream (`scores.TopTokens`).
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
  """mix T^2 KL(teacher || student) at temperature T, and 1 - mix of the cross-entropy.

  Hinton et al. (2015), arXiv:1503.02531, section 2, with the KL divergence in place of the cross-entropy of the
  two distributions, which differs by a constant. The reverse direction, KL(student || teacher), is that of
  MiniLLM (Gu et al. 2024, arXiv:2306.08543). A run is judged by its cross-entropy, 'loss'.

  Attributes:
    teacher: a model of any family with the same vocabulary; None where the rows hold its likeliest tokens.
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
    # Arrays stand here while the members of a population are traced.
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
    """Where the teacher is frozen beside the training rows, those of validation are plain text."""
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
      given = tuple(batch[key] for key in TopTokens.keys)
      distributions = self._with_frozen
    else:
      given = (teacher.features(batch)[0],)
      readout = teacher.readout()

      def distributions(logits, features):
        return self._log_softmax(logits), self._log_softmax(readout(features))

    def sums(logits, targets, weights, *given):
      student, teacher = distributions(logits, *given)
      kl = jnp.sum(weights * self._divergence(student, teacher))
      nll = jnp.sum(weights * token_losses(logits, targets, 0.0)[0])
      return (self.mix * self.temperature**2 * kl, (1 - self.mix) * nll), (nll, kl)

    (distillation, data), (nll, kl) = sum_over_tokens(
      model.readout(),
      sums,
      features,
      batch['decoder_target_tokens'],
      weights,
      *given,
      chunks=chunks,
    )
    counts = {'weight': jnp.sum(weights), 'loss': nll, 'divergence': kl}
    return {'distillation': distillation, 'data': data}, counts

  def _log_softmax(self, logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits / self.temperature)

  def _divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Of log-probabilities [batch, length, outcomes], [batch, length]."""
    p, q = (teacher, student) if self.direction == 'forward' else (student, teacher)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

  def _with_frozen(self, logits, tokens, log_probs):
    """Log-probabilities of the teacher's k likeliest tokens, and of all others as one outcome.

    Without that outcome the k would stand for all the teacher's mass, and the student would learn that
    nothing else is possible. By the chain rule of the divergence the result is at most that of the whole
    distributions, and equal to it where the k are the whole vocabulary.
    """
    student = self._log_softmax(logits)
    # A gather over a sharded vocabulary is refused: every device has the whole of its tokens here.
    student = shard(student, 'batch', 'length', None)
    student = jnp.take_along_axis(student, tokens, axis=-1)
    if tokens.shape[-1] == logits.shape[-1]:  # nothing is left
      return student, log_probs
    return _with_rest(student), _with_rest(log_probs)


def _with_rest(log_probs: jax.Array) -> jax.Array:
  """Log-probabilities [..., k], and behind them that of everything else."""
  rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
  # Less than float32 can tell from 1 is rounding.
  log_rest = jnp.log(jnp.maximum(rest, 1e-7))
  return jnp.concatenate([log_probs, log_rest], axis=-1)
