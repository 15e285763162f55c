"""Scores of a stream by a trained model: a teacher's likeliest tokens, a reference's log-probabilities."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid
from research.data.scores import Batch, Scores
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training.cross_entropy import log_probabilities


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByModel(Scores):
  """Base class of scores by a model.

  Attributes:
    model: the model. It reads the rows of the stream as training does.
  """

  model: Pretrained

  def __post_init__(self):
    if not isinstance(self.model, Pretrained):
      raise Invalid(type(self), 'model', 'must be @pretrained.Pretrained() with its parentheses.')

  def described(self) -> dict:
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del fields['batch_size']
    return fields | {'model': self.model.described()}

  def scorer(self) -> Callable[[Batch], Batch]:
    # Only one process scores, and the others wait for it, so it uses its own devices, each with the whole
    # model.
    devices = jax.local_devices()
    # Batches are split over the devices, or computed by one if they cannot be split equally.
    devices = devices[: len(devices) if self.batch_size % len(devices) == 0 else 1]
    with Mesh().use(devices):
      graphdef, params = nnx.graphdef(self.model.abstract), self.model.params()

    @jax.jit
    def features(params, batch):
      return self.features(nnx.merge(graphdef, params), batch)

    def score(rows: Batch) -> Batch:
      with Mesh().use(devices):
        return jax.device_get(features(params, hosts.place(rows)))

    return score

  def features(self, model, batch: dict) -> dict[str, jax.Array]:
    """Returns the scores of a batch on the device, by key."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogProbabilities(_ByModel):
  """The log-probability of every target token by a reference model, float32 [length], in nats."""

  keys: ClassVar[tuple[str, ...]] = ('decoder_reference_log_probs',)

  def shapes(self, length):
    return {self.keys[0]: ((length,), np.dtype(np.float32))}

  def features(self, model, batch):
    x, _ = model.features(batch)
    targets = batch['decoder_target_tokens']
    return {self.keys[0]: log_probabilities(model.readout(), x, targets)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopTokens(_ByModel):
  """A teacher's likeliest next tokens and their log-probabilities, [length, tokens] each.

  Attributes:
    tokens: how many tokens per position.
    temperature: the log-probabilities are those of softmax(logits / temperature). It must be the temperature of
      the distillation.
  """

  tokens: int = 64
  temperature: float = 1.0

  keys: ClassVar[tuple[str, ...]] = ('decoder_teacher_tokens', 'decoder_teacher_log_probs')

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.tokens, int) or self.tokens < 1:
      raise Invalid(TopTokens, 'tokens', f'{self.tokens!r} must be a positive whole number.')
    if not self.temperature > 0:
      raise Invalid(TopTokens, 'temperature', f'{self.temperature!r} must be above 0.')

  def features(self, model, batch):
    if self.tokens > model.vocab:
      why = f'{self.tokens} are more than the {model.vocab} logits of the teacher.'
      raise Invalid(TopTokens, 'tokens', why)
    x, _ = model.features(batch)
    log_probs = jax.nn.log_softmax(model.readout()(x) / self.temperature)
    values, tokens = jax.lax.top_k(log_probs, self.tokens)
    # Fewer bytes to copy to the host and to disk.
    small = jnp.uint16 if model.vocab <= 1 << 16 else jnp.int32
    return {'decoder_teacher_tokens': tokens.astype(small), 'decoder_teacher_log_probs': values}

  def shapes(self, length):
    shape = (length, self.tokens)
    tokens, log_probs = self.keys
    return {tokens: (shape, np.dtype(np.int32)), log_probs: (shape, np.dtype(np.float32))}

  def facts(self, rows: Batch) -> dict[str, float]:
    weights = rows['decoder_loss_weights']
    left_out = 1 - np.exp(rows['decoder_teacher_log_probs'].astype(np.float64)).sum(-1)
    return {'left_out': float((left_out * weights).sum()), 'weight': float(weights.sum())}

  def summary(self, facts: dict[str, float]) -> str:
    share = max(0.0, facts['left_out'] / max(facts['weight'], 1.0))
    return (
      f"the teacher's {self.tokens} likeliest tokens leave out {share:.2%} of its probability "
      f'(at temperature {self.temperature:g}); the student learns all other tokens as one outcome'
    )
