"""Losses of reinforcement, over rows that `rollouts.Rollouts` made: completions and their advantages.

The policy is softmax(logits / temperature), in rollouts and in updates alike. Every sum runs over the tokens of
completions alone, and is independent of how a batch is cut.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.core.errors import Invalid
from research.training.cross_entropy import log_probabilities
from research.training.experience import Experience
from research.training.losses import CrossEntropy, Loss, check_vocabulary

ADVANTAGES = 'decoder_advantages'
OLD = 'decoder_old_log_probs'
REFERENCE = 'decoder_reference_log_probs'
VALUES = 'decoder_old_values'
RETURNS = 'decoder_returns'

# exp of more would overflow where a policy has moved far; such ratios are clipped anyway.
LARGEST_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Loss):
  """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = new probability / that of the rollout.

  Schulman et al. (2017), arXiv:1707.06347, equation 7. With group advantages it is GRPO (Shao et al. 2024,
  arXiv:2402.03300, equation 3), with `per` a number and unscaled advantages Dr. GRPO (Liu et al. 2025,
  arXiv:2503.20783), with `per` 'token' and a larger `clip_high` DAPO (Yu et al. 2025, arXiv:2503.14476), with
  `ratio` 'sequence' GSPO (Zheng et al. 2025, arXiv:2507.18071). Where a rollout serves one update the ratio is
  1, and what is left is REINFORCE.

  Attributes:
    clip_low, clip_high: how far a ratio counts.
    per: what is averaged: 'token', over all tokens of the batch; 'sequence', over the tokens of each completion
      and then over completions; a number, which every completion's sum is divided by.
    ratio: of each 'token', or of a whole 'sequence': the geometric mean of its tokens' ratios.
    kl: weight of the divergence from a reference, which `Rollouts.reference` names: the estimate
      r - ln r - 1, r = reference / policy, per token (GRPO, equation 4).
    temperature: the logits are divided by it.
  """

  clip_low: float = 0.2
  clip_high: float = 0.2
  per: str | int = 'sequence'
  ratio: str = 'token'
  kl: float = 0.0
  temperature: float = 1.0

  nats: ClassVar[bool] = False

  def __post_init__(self):
    for field in ('clip_low', 'clip_high', 'temperature'):
      if not getattr(self, field) > 0:
        raise Invalid(type(self), field, f'{getattr(self, field)!r} must be above 0.')
    if not self.kl >= 0:
      raise Invalid(type(self), 'kl', f'{self.kl!r} must be 0 or more.')
    number = isinstance(self.per, int) and self.per > 0
    if self.per not in ('token', 'sequence') and not number:
      why = f"{self.per!r} is neither 'token' nor 'sequence', nor a number of tokens above 0."
      raise Invalid(type(self), 'per', why)
    if self.ratio not in ('token', 'sequence'):
      raise Invalid(type(self), 'ratio', f"{self.ratio!r} is neither 'token' nor 'sequence'.")

  @property
  def reads(self) -> tuple[str, ...]:
    return (*Loss.reads, ADVANTAGES, OLD, *((REFERENCE,) if self.kl else ()))

  @property
  def numbers(self) -> dict[str, float]:
    return {}  # runs of reinforcement are no members of a population

  @property
  def evaluation(self) -> Loss:
    """The cross-entropy of the validation stream: what reinforcement costs on text as it was before."""
    return CrossEntropy()

  def check(self, run, vocab: int) -> None:
    super().check(run, vocab)
    if not isinstance(run.train, Experience):
      why = f'{type(self).__name__} learns from rollouts: set Run.train = @rollouts.Rollouts().'
      raise Invalid(type(run), 'train', why)
    reference = getattr(run.train, 'reference', None)
    if reference is not None:
      check_vocabulary(type(run.train), 'reference', reference, vocab)
    elif self.kl:
      why = f'{self.kl} is the weight of a reference: set Rollouts.reference, or leave it at 0.'
      raise Invalid(type(self), 'kl', why)

  def __call__(self, model, features, batch, chunks):
    mask = batch['decoder_loss_weights'].astype(jnp.float32)
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    weights, total = self._weights(mask, tokens)
    readout = model.readout()
    log_probs = log_probabilities(
      lambda x: readout(x) / self.temperature,
      features,
      batch['decoder_target_tokens'],
      chunks=chunks,
    )
    difference = (log_probs - batch[OLD]) * mask
    if self.ratio == 'sequence':
      mean = jnp.sum(difference, axis=1, keepdims=True) / jnp.maximum(tokens, 1.0)
      difference = mean * mask
    ratio = jnp.exp(jnp.clip(difference, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    free = ratio * batch[ADVANTAGES]
    clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * batch[ADVANTAGES]
    terms = {'loss': -jnp.sum(weights * jnp.minimum(free, clipped))}
    # Weights of means: they add up to `total`, which these sums are divided by as well.
    of_tokens = mask / jnp.maximum(tokens, 1.0) * self.per if isinstance(self.per, int) else weights
    counts = {
      'weight': total,
      'ratio': jnp.sum(of_tokens * ratio),
      'clip_fraction': jnp.sum(of_tokens * (clipped < free)),
    }
    if REFERENCE in batch:
      log_r = (batch[REFERENCE] - log_probs) * mask
      estimate = jnp.exp(jnp.minimum(log_r, LARGEST_LOG_RATIO)) - log_r - 1
      counts['kl_per_token'] = jnp.sum(of_tokens * estimate)
      if self.kl:
        terms['kl_loss'] = self.kl * jnp.sum(weights * estimate)
    return terms, counts

  def _weights(self, mask: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what each token counts [batch, length], what the sum is divided by)."""
    if self.per == 'token':
      return mask, jnp.sum(mask)
    if self.per == 'sequence':
      return mask / jnp.maximum(tokens, 1.0), _sequences(tokens)
    return mask, _sequences(tokens) * self.per


def _sequences(tokens: jax.Array) -> jax.Array:
  """How many rows have a completion; tokens [batch, 1] of each."""
  return jnp.sum((tokens > 0).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(PolicyGradient):
  """The clipped policy loss and that of the values.

  Schulman et al. (2017), arXiv:1707.06347; Ouyang et al. (2022), arXiv:2203.02155.

  A value's loss is half of max((v - R)^2, (v' - R)^2): R is the return, v' the value at most `value_clip` away
  from the rollout's. The model has a head of values (`LanguageModel.value = @heads.ScalarHead`), and the
  advantages are `advantages.GAE`.

  Attributes:
    value: weight of the values' loss.
    value_clip: None for no clipping.
  """

  per: str | int = 'token'
  value: float = 0.1
  value_clip: float | None = 0.2

  def __post_init__(self):
    super().__post_init__()
    if not self.value > 0:
      raise Invalid(PPO, 'value', f'{self.value!r} must be above 0.')
    if self.value_clip is not None and not self.value_clip > 0:
      raise Invalid(PPO, 'value_clip', f'{self.value_clip!r} must be above 0, or None.')

  @property
  def reads(self) -> tuple[str, ...]:
    return (*super().reads, VALUES, RETURNS)

  def check(self, run, vocab: int) -> None:
    super().check(run, vocab)
    if getattr(run.model, 'keywords', {}).get('value') is None:
      why = 'PPO needs a head of values: set LanguageModel.value = @heads.ScalarHead.'
      raise Invalid(getattr(run.model, 'func', run.model), 'value', why)

  def __call__(self, model, features, batch, chunks):
    terms, counts = super().__call__(model, features, batch, chunks)
    mask = batch['decoder_loss_weights'].astype(jnp.float32)
    weights, _ = self._weights(mask, jnp.sum(mask, axis=1, keepdims=True))
    values, old, returns = model.values(features), batch[VALUES], batch[RETURNS]
    loss = (values - returns) ** 2
    if self.value_clip is not None:
      near = jnp.clip(values, old - self.value_clip, old + self.value_clip)
      loss = jnp.maximum(loss, (near - returns) ** 2)
    terms['value_loss'] = self.value * 0.5 * jnp.sum(weights * loss)
    return terms, counts
