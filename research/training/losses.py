"""What a run minimises.

A loss is a frozen dataclass: its fields are its knobs, and calling it gives sums over a batch. Sums and not
means, so that microbatches, and the parts of a batch on other devices, add up to the whole batch exactly.
A field may be another model (a teacher, a reference), which is read and does not learn. Bind a loss in a gin
file: `run.Run.loss = @losses.CrossEntropy()`. A loss of your own is a class like these in a module of your own.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid
from research.training.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """Base class of losses.

  Class attributes:
    reads: the keys of a batch that it needs.
    nats: whether 'loss' is in nats per target token, so that it can be told in bits per byte of text.
    reports: names of its terms and counts that stand in a run's row, beside 'loss'.
    wants: what the model's head must give, 'logits' or 'scores' (`heads.Head.gives`).
  """

  reads: ClassVar[tuple[str, ...]] = ('decoder_target_tokens', 'decoder_loss_weights')
  nats: ClassVar[bool] = True
  reports: ClassVar[tuple[str, ...]] = ()
  wants: ClassVar[str] = 'logits'

  def __call__(
    self, model, features: jax.Array, batch: dict, chunks: int, **models
  ) -> tuple[dict, dict]:
    """Sums over a batch.

    Args:
      model: has `readout()`, which gives the function from features to logits.
      features: of the batch's targets, [batch, length, embed].
      batch: arrays [batch, length] by seqio's keys.
      chunks: wherever there are logits, the length is cut into so many parts; it divides the length.
      **models: of its fields `models`, by name.

    Returns:
      terms: by name, the sums that are minimised together.
      counts: by name, sums that are only reported. 'weight' is what all sums are divided by. One of the terms
        or counts is 'loss', which a run is judged by.
    """
    raise NotImplementedError

  @property
  def evaluation(self) -> 'Loss':
    """The loss that an evaluation sums; another one where validation rows lack what training reads."""
    return self

  @property
  def models(self) -> dict[str, Pretrained]:
    """The fields that are other models. They are no part of a run's state, and have no gradient."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in fields.items() if isinstance(value, Pretrained)}

  def check(self, run, vocab: int) -> None:
    """Raises `Invalid` where the loss does not suit its run, beyond the keys that it reads.

    Args:
      run: the `Run`.
      vocab: how many logits the model has.
    """
    for name, other in self.models.items():
      check_vocabulary(type(self), name, other, vocab)
    head = getattr(run.model, 'keywords', {}).get('head')
    gives = getattr(getattr(head, 'func', head), 'gives', self.wants)
    # Of a single logit every cross-entropy is 0, and any logit could be taken for a score.
    if gives != self.wants:
      how = 'set its head to @heads.ScalarHead' if self.wants == 'scores' else 'choose another head'
      why = (
        f'{type(self).__name__} needs a model of {self.wants}, and its head gives {gives}: {how}.'
      )
      raise Invalid(type(run), 'loss', why)

  @property
  def numbers(self) -> dict[str, float]:
    """The fields that are plain numbers. Members of a population may differ in them."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def check_vocabulary(owner: type, field: str, other: Pretrained, vocab: int) -> None:
  """Raises `Invalid` where another model has other logits than the run's own."""
  if other.abstract.vocab != vocab:
    why = f'it has {other.abstract.vocab} logits and the model {vocab}: both need one vocabulary.'
    raise Invalid(owner, field, why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
  """Negative log-likelihood in nats per target token.

  Attributes:
    z_loss: weight of log(Z)^2, which keeps the logits' scale (PaLM, arXiv:2204.02311, section 5: 1e-4).
  """

  z_loss: float = 0.0

  def __post_init__(self):
    # An array stands here while the members of a population are traced.
    if isinstance(self.z_loss, int | float) and not self.z_loss >= 0:
      raise Invalid(CrossEntropy, 'z_loss', f'{self.z_loss!r} must be 0 or more.')

  def __call__(self, model, features, batch, chunks):
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets = batch['decoder_target_tokens']
    loss, z_loss = cross_entropy(
      model.readout(), features, targets, weights, z_loss=self.z_loss, chunks=chunks
    )
    return {'loss': loss, 'z_loss': z_loss}, {'weight': jnp.sum(weights)}
