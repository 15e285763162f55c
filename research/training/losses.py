"""Losses: what a run minimises.

A loss is a frozen dataclass. Its fields are its knobs, and a call returns sums over a batch: sums and not
means, so that microbatches, and the parts of a batch on other devices, add up to the whole batch exactly. A
field may be another model (a teacher, a reference), which the loss reads and which does not learn.

Bind a loss in a gin file: `run.Run.loss = @losses.CrossEntropy()`. A loss of your own is a class like these, in
a module of your own.
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
    nats: whether 'loss' is in nats per target token, so that it can be converted to bits per byte of text.
    reports: names of the terms and counts that stand in a run's row, beside 'loss'.
    wants: the output that it needs from the model's head, 'logits' or 'scores' (`heads.Head.gives`).
  """

  reads: ClassVar[tuple[str, ...]] = ('decoder_target_tokens', 'decoder_loss_weights')
  nats: ClassVar[bool] = True
  reports: ClassVar[tuple[str, ...]] = ()
  wants: ClassVar[str] = 'logits'

  def __call__(
    self, model, features: jax.Array, batch: dict, chunks: int, **models
  ) -> tuple[dict, dict]:
    """Returns sums over a batch.

    Args:
      model: its `readout()` returns the function from features to logits.
      features: the model's features at the batch's targets, [batch, length, embed].
      batch: arrays [batch, length] by seqio's keys.
      chunks: the number of parts that the length is cut into wherever there are logits; divides the length.
      **models: the models of the property `models`, by name.

    Returns:
      terms: by name, the sums that are minimised together.
      counts: by name, sums that are only reported. All sums are divided by 'weight'. One of the terms or counts
        is 'loss', by which runs are compared.
    """
    raise NotImplementedError

  @property
  def evaluation(self) -> 'Loss':
    """The loss of an evaluation. It is another one if validation rows lack a key that training reads."""
    return self

  @property
  def models(self) -> dict[str, Pretrained]:
    """The fields that are other models. They are not part of a run's state and have no gradient."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in fields.items() if isinstance(value, Pretrained)}

  def check(self, run, vocab: int) -> None:
    """Raises `Invalid` if the loss does not suit its run. The keys that it reads are checked elsewhere.

    Args:
      run: the `Run`.
      vocab: how many logits the model has.
    """
    for name, other in self.models.items():
      check_vocabulary(type(self), name, other, vocab)
    head = getattr(run.model, 'keywords', {}).get('head')
    gives = getattr(getattr(head, 'func', head), 'gives', self.wants)
    # Otherwise a wrong head goes unnoticed: the cross-entropy of a single logit is always 0, and any logit
    # looks like a score.
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
  """Raises `Invalid` if another model has more or fewer logits than the run's model.

  Args:
    owner: the class of the field, for the message.
    field: the field that holds the other model.
    other: the other model.
    vocab: how many logits the run's model has.
  """
  if other.abstract.vocab != vocab:
    why = (
      f'it has {other.abstract.vocab} logits and the model {vocab}: both need the same vocabulary.'
    )
    raise Invalid(owner, field, why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
  """Negative log-likelihood in nats per target token.

  Attributes:
    z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5: 1e-4).
  """

  z_loss: float = 0.0

  def __post_init__(self):
    # It is an array while the members of a population are traced, and an array has no truth value.
    if isinstance(self.z_loss, int | float) and not self.z_loss >= 0:
      raise Invalid(CrossEntropy, 'z_loss', f'{self.z_loss!r} must be 0 or more.')

  def __call__(self, model, features, batch, chunks):
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets = batch['decoder_target_tokens']
    loss, z_loss = cross_entropy(
      model.readout(), features, targets, weights, z_loss=self.z_loss, chunks=chunks
    )
    return {'loss': loss, 'z_loss': z_loss}, {'weight': jnp.sum(weights)}
