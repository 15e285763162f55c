"""Losses of preferences: of two answers to a prompt, people chose one and rejected the other.

In every row segment 1 is a chosen answer and segment 2 the rejected one, 3 and 4 are the next pair, and so on
(`objectives.Preferences`). Each loss is a mean over pairs; that of `KTO` is a mean over answers. The
log-probabilities of a reference model are frozen beside the stream (`scores.LogProbabilities`), so that the
step needs one model only, or they are computed in every step.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid
from research.data.mixtures import streams_of
from research.parallel.axes import shard
from research.training.cross_entropy import log_probabilities
from research.training.losses import Loss
from research.training.scores import LogProbabilities

# Values of the chosen and of the rejected answers, [batch, length / 2] each: a row has at most length / 2
# pairs.
Pair = tuple[jax.Array, jax.Array]


def of_segments(values: jax.Array, segments: jax.Array) -> Pair:
  """Sums values [batch, length] over every segment of a row; returns those of odd and of even segments."""
  # The shapes must be static, so there is an entry for every pair that a row could have.
  most = 2 * (values.shape[1] // 2) + 1
  # A segment may cross devices that share a row's length, so each device takes whole rows.
  values = shard(values, 'batch', None)
  segments = shard(segments, 'batch', None)
  add = functools.partial(jax.ops.segment_sum, num_segments=most)
  # Segment 0 is padding.
  sums = jax.vmap(add)(values, segments)
  return sums[:, 1::2], sums[:, 2::2]


def _check_positive(loss, *names: str) -> None:
  for name in names:
    value = getattr(loss, name)
    # It is an array while the members of a population are traced, and an array has no truth value.
    if isinstance(value, int | float) and not value > 0:
      raise Invalid(type(loss), name, f'{value!r} must be above 0.')


def _check_smoothing(loss) -> None:
  value = loss.label_smoothing
  if isinstance(value, int | float) and not 0 <= value < 0.5:
    raise Invalid(type(loss), 'label_smoothing', f'{value!r} must be from 0 to under 0.5.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Loss):
  """Base class of the losses of pairs."""

  nats: ClassVar[bool] = False
  reads: ClassVar[tuple[str, ...]] = (*Loss.reads, 'decoder_segment_ids')
  reports: ClassVar[tuple[str, ...]] = ('accuracy', 'margin')

  # The name of the objective whose rows the loss reads.
  task: ClassVar[str] = 'preferences'

  def check(self, run, vocab: int) -> None:
    super().check(run, vocab)
    if any(cut > 1 for _, cut in run.batches.sizes()):
      raise Invalid(type(run), 'curriculum', 'would cut through answers; let cut be 1.')
    # Rows of another objective have no pairs, and the loss would be 0 without a word.
    for stream in (*streams_of(run.train), *streams_of(run.validation)):
      if stream.name != self.task:
        why = f'{type(self).__name__} needs rows of {self.task!r}, and a stream of the run has {stream.name!r}.'
        raise Invalid(type(run), 'loss', why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Pairs):
  """Base class of the losses of a policy. A subclass defines the reward of an answer and the cost of a pair.

  Attributes:
    beta: the factor of differences of log-probabilities.
  """

  beta: float = 0.1

  def __post_init__(self):
    _check_positive(self, 'beta')

  def __call__(self, model, features, batch, chunks, **models):
    *rewards, lengths, policy = self.rewards(model, features, batch, chunks, **models)
    present = ((lengths[0] > 0) & (lengths[1] > 0)).astype(jnp.float32)
    lengths = tuple(jnp.maximum(n, 1.0) for n in lengths)
    margin = rewards[0] - rewards[1]
    counts = {
      'weight': present,
      'accuracy': present * (margin > 0),
      'margin': present * margin,
      'chosen': present * rewards[0],
      'rejected': present * rewards[1],
    }
    cost = present * self.cost(margin, policy, lengths)
    return {'loss': jnp.sum(cost)}, {name: jnp.sum(value) for name, value in counts.items()}

  def rewards(self, model, features, batch, chunks, **models) -> tuple:
    """Returns (rewards of odd segments, rewards of even segments, lengths, log-probabilities).

    Lengths and log-probabilities are pairs as of `of_segments`. The length of a segment that a row lacks is 0.
    """
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets, segments = batch['decoder_target_tokens'], batch['decoder_segment_ids']
    log_probs = log_probabilities(model.readout(), features, targets, chunks=chunks)
    policy = of_segments(log_probs * weights, segments)
    reference = self.reference_sums(batch, weights, chunks, **models)
    lengths = of_segments(weights, segments)
    # At least 1, so that a missing segment does not divide by 0; its cost is masked later.
    sides = zip(policy, reference, (jnp.maximum(n, 1.0) for n in lengths), strict=True)
    return *(self.reward(*side) for side in sides), lengths, policy

  def reference_sums(self, batch, weights, chunks) -> tuple:
    """Returns the reference's log-probabilities of the answers, as a pair; zeros without a reference."""
    return 0.0, 0.0

  def reward(self, policy, reference, length):
    """Returns the reward of an answer that the policy implies, up to a constant of its prompt.

    Args:
      policy: the answer's log-probability by the policy, summed over tokens.
      reference: the same by the reference.
      length: tokens of the answer.
    """
    raise NotImplementedError

  def cost(self, margin: jax.Array, policy: Pair, lengths: Pair) -> jax.Array:
    """Returns the cost of every pair.

    Args:
      margin: the reward of the chosen answer minus that of the rejected one.
      policy: log-probabilities of the answers by the policy.
      lengths: tokens of the answers.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgainstReference(Preference):
  """Base class of losses that compare the policy with a reference.

  Attributes:
    reference: a model; None if the rows hold its log-probabilities.
  """

  reference: Pretrained | None = None

  @property
  def reads(self) -> tuple[str, ...]:
    return Pairs.reads if self.reference else (*Pairs.reads, *LogProbabilities.keys)

  def reference_sums(self, batch, weights, chunks, reference=None):
    if reference is None:
      (log_probs,) = (batch[key] for key in LogProbabilities.keys)
    else:
      features, targets = reference.features(batch)[0], batch['decoder_target_tokens']
      log_probs = log_probabilities(reference.readout(), features, targets, chunks=chunks)
    return of_segments(log_probs * weights, batch['decoder_segment_ids'])

  def reward(self, policy, reference, length):
    return self.beta * (policy - reference)


def _log_loss(margin: jax.Array, label_smoothing) -> jax.Array:
  """-log sigma(margin), where the share `label_smoothing` of the labels is assumed to be wrong."""
  right = jax.nn.log_sigmoid(margin)
  wrong = jax.nn.log_sigmoid(-margin)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(AgainstReference):
  """-log sigma(beta (log-ratio of the chosen answer - log-ratio of the rejected one)).

  Rafailov et al. (2023), arXiv:2305.18290, equation 7.

  Attributes:
    label_smoothing: the share of pairs that is assumed to be labelled wrongly: cDPO (Mitchell 2023, "A note on
      DPO with noisy preferences and relationship to IPO", equation 3).
  """

  label_smoothing: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    _check_smoothing(self)

  def cost(self, margin, policy, lengths):
    return _log_loss(margin, self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPO(AgainstReference):
  """(h - 1 / (2 beta))^2, h being the difference of the log-ratios.

  Azar et al. (2023), arXiv:2310.12036, equation 17.

  Attributes:
    per_token: log-ratios are means over an answer's tokens, as its authors came to advise, and not sums.
  """

  per_token: bool = False

  def reward(self, policy, reference, length):
    ratio = policy - reference
    return ratio / length if self.per_token else ratio

  def cost(self, margin, policy, lengths):
    return (margin - 0.5 / self.beta) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO(AgainstReference):
  """1 - sigma(r - z) of good answers, 1 - sigma(z - r) of bad ones, r = beta log-ratio: a mean over answers.

  Ethayarajh et al. (2024), arXiv:2402.01306, equations 7 and 8, for answers that were judged one by one
  (`objectives.Judgements`). In the paper z is beta times an estimate of the policy's divergence from the
  reference, over the answers to other prompts in the same microbatch, so the loss depends on how a batch is
  cut. Here z is a constant. With 0 the loss is the unpaired form of APO-zero (D'Oosterlinck et al. 2024,
  arXiv:2408.06266).

  Attributes:
    zero: z, the reward above which an answer counts as a gain.
    good: lambda_D, the weight of good answers; it can compensate for their share of the data.
    bad: lambda_U, the weight of bad answers.
  """

  zero: float = 0.0
  good: float = 1.0
  bad: float = 1.0

  task: ClassVar[str] = 'judgements'
  reports: ClassVar[tuple[str, ...]] = ('accuracy',)

  def __post_init__(self):
    super().__post_init__()
    _check_positive(self, 'good', 'bad')

  def __call__(self, model, features, batch, chunks, **models):
    good, bad, lengths, _ = self.rewards(model, features, batch, chunks, **models)
    are_good, are_bad = ((n > 0).astype(jnp.float32) for n in lengths)
    cost = self.good * are_good * jax.nn.sigmoid(self.zero - good)
    cost += self.bad * are_bad * jax.nn.sigmoid(bad - self.zero)
    counts = {
      'weight': are_good + are_bad,
      'accuracy': are_good * (good > self.zero) + are_bad * (bad < self.zero),
    }
    return {'loss': jnp.sum(cost)}, {name: jnp.sum(value) for name, value in counts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
  """-log sigma(beta (mean log p of the chosen answer - of the rejected one) - gamma), without a reference.

  Meng et al. (2024), arXiv:2405.14734, equation 6.

  Attributes:
    gamma: the target margin.
  """

  beta: float = 2.0
  gamma: float = 1.0

  def reward(self, policy, reference, length):
    return self.beta * policy / length

  def cost(self, margin, policy, lengths):
    return -jax.nn.log_sigmoid(margin - self.gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO(Preference):
  """The chosen answer's mean cross-entropy, and -beta log sigma(log of the odds ratio), without a reference.

  Hong et al. (2024), arXiv:2403.07691, equations 6 and 7; odds are of the mean log-probability per token.
  """

  def reward(self, policy, reference, length):
    mean = policy / length
    # log(p / (1 - p)) has no finite value at p = 1, where the mean is 0.
    mean = jnp.minimum(mean, -1e-6)
    return mean - jnp.log(-jnp.expm1(mean))

  def cost(self, margin, policy, lengths):
    return -policy[0] / lengths[0] - self.beta * jax.nn.log_sigmoid(margin)
