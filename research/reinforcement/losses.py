"""Losses of reinforcement learning, over rows of `rollouts.Rollouts`: completions and their advantages.

The policy is softmax(logits / temperature), both in rollouts and in updates. Every sum is over the tokens of
completions only, and does not depend on how a batch is cut into microbatches.
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

# exp of more could overflow where a policy has moved far. The loss clips such ratios in any case.
LARGEST_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Loss):
  """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = new probability / that of the rollout.

  Schulman et al. (2017), arXiv:1707.06347, equation 7. With group advantages it is GRPO (Shao et al. 2024,
  arXiv:2402.03300, equation 3), with `per` a number and unscaled advantages Dr. GRPO (Liu et al. 2025,
  arXiv:2503.20783), with `per` 'token' and a larger `clip_high` DAPO (Yu et al. 2025, arXiv:2503.14476), with
  `ratio` 'sequence' GSPO (Zheng et al. 2025, arXiv:2507.18071). In the first update of a round the ratio is 1,
  and its gradient is that of REINFORCE.

  Attributes:
    clip_low, clip_high: how far from 1 a ratio counts.
    per: the average: 'token', over all tokens of the batch; 'sequence', over the tokens of each completion and
      then over completions; or a number of tokens, by which every completion's sum is divided.
    ratio: of each 'token', or of a whole 'sequence': the geometric mean of its tokens' ratios.
    kl: weight of the divergence from `Rollouts.reference`: the estimate r - ln r - 1 of each token, with
      r = reference / policy (GRPO, equation 4).
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
    return {}  # runs of reinforcement learning do not train in a population

  @property
  def evaluation(self) -> Loss:
    """The cross-entropy of the validation stream: what the policy forgets of plain text."""
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
      why = f'{self.kl} needs a reference: set Rollouts.reference, or leave it at 0.'
      raise Invalid(type(self), 'kl', why)

  def __call__(self, model, features, batch, chunks):
    mask = batch['decoder_loss_weights'].astype(jnp.float32)
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    weights, total = self._weights(mask, tokens)
    log_probs = self._log_probs(model, features, batch, chunks)
    log_ratio = (log_probs - batch[OLD]) * mask
    if self.ratio == 'sequence':
      mean = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(tokens, 1.0)
      log_ratio = mean * mask
    ratio = jnp.exp(jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    unclipped = ratio * batch[ADVANTAGES]
    clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * batch[ADVANTAGES]
    terms = {'loss': -jnp.sum(weights * jnp.minimum(unclipped, clipped))}
    # The step divides all sums by `total`. The metrics are means, so that their weights must add up to it; with
    # `per` a number those of the loss do not.
    mean_weights = weights
    if isinstance(self.per, int):
      mean_weights = mask / jnp.maximum(tokens, 1.0) * self.per
    counts = {
      'weight': total,
      'ratio': jnp.sum(mean_weights * ratio),
      'clip_fraction': jnp.sum(mean_weights * (clipped < unclipped)),
    }
    if REFERENCE in batch:
      log_r = (batch[REFERENCE] - log_probs) * mask
      estimate = jnp.exp(jnp.minimum(log_r, LARGEST_LOG_RATIO)) - log_r - 1
      counts['kl_per_token'] = jnp.sum(mean_weights * estimate)
      if self.kl:
        terms['kl_loss'] = self.kl * jnp.sum(weights * estimate)
    return terms, counts

  def _log_probs(self, model, features, batch, chunks) -> jax.Array:
    """ln p of every target by the policy, [batch, length]."""
    readout = model.readout()

    def tempered(x):
      return readout(x) / self.temperature

    targets = batch['decoder_target_tokens']
    return log_probabilities(tempered, features, targets, chunks=chunks)

  def _weights(self, mask: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the weight of each token [batch, length], the number that the weighted sum is divided by)."""
    if self.per == 'token':
      return mask, jnp.sum(mask)
    if self.per == 'sequence':
      return mask / jnp.maximum(tokens, 1.0), _sequences(tokens)
    return mask, _sequences(tokens) * self.per


def _sequences(tokens: jax.Array) -> jax.Array:
  """How many rows have a completion.

  Args:
    tokens: of each row's completion, [batch, 1].
  """
  return jnp.sum((tokens > 0).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(PolicyGradient):
  """The clipped policy loss, and the loss of the values.

  Schulman et al. (2017), arXiv:1707.06347; Ouyang et al. (2022), arXiv:2203.02155.

  A value's loss is half of max((v - R)^2, (v' - R)^2): R is the return, v' is v clipped to at most `value_clip`
  from the rollout's value. The model needs a value head (`LanguageModel.value = @heads.ScalarHead`), and
  `Rollouts.advantages` must be `advantages.GAE`.

  Attributes:
    value: weight of the values' loss.
    value_clip: see above; None for no clipping.
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
      why = 'PPO needs a value head: set LanguageModel.value = @heads.ScalarHead.'
      raise Invalid(getattr(run.model, 'func', run.model), 'value', why)

  def __call__(self, model, features, batch, chunks):
    terms, counts = super().__call__(model, features, batch, chunks)
    mask = batch['decoder_loss_weights'].astype(jnp.float32)
    weights, _ = self._weights(mask, jnp.sum(mask, axis=1, keepdims=True))
    values = model.values(features)
    old = batch[VALUES]
    returns = batch[RETURNS]
    loss = (values - returns) ** 2
    if self.value_clip is not None:
      clipped = jnp.clip(values, old - self.value_clip, old + self.value_clip)
      loss = jnp.maximum(loss, (clipped - returns) ** 2)
    terms['value_loss'] = self.value * 0.5 * jnp.sum(weights * loss)
    return terms, counts
