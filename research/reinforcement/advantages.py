"""Advantages: how much better a completion, or one of its tokens, was than expected. Host arrays in float64.

A score is NaN where the reward abstained. It is left out of the means, and its advantage is 0.
"""

import abc
import dataclasses

import numpy as np

from research.core.errors import Invalid

# Scores that differ by less are equal. Their difference is rounding, which a division would turn into a signal.
EQUAL = 1e-6


@dataclasses.dataclass(frozen=True)
class Round:
  """A round of completions, from which advantages are computed.

  The completions of one prompt are a group: `size` rows next to each other, so that rows = groups x size.

  Attributes:
    scores: [groups, size], NaN where the reward abstained.
    penalties: [rows, length], subtracted from the reward at each token (`penalty.KL`); 0 outside completions.
    mask: [rows, length], 1 on the tokens of completions.
    values: [rows, length], the return expected before each token; None without a value head.
  """

  scores: np.ndarray
  penalties: np.ndarray
  mask: np.ndarray
  values: np.ndarray | None = None

  @property
  def penalised(self) -> np.ndarray:
    """The scores less the penalties of all tokens, [groups, size]."""
    return self.scores - self.penalties.sum(1).reshape(self.scores.shape)


class Advantages(abc.ABC):
  """Base of the advantage estimators. `reads_values` says whether the model needs a value head."""

  reads_values = False

  @abc.abstractmethod
  def __call__(self, batch: Round) -> tuple[np.ndarray, np.ndarray | None]:
    """(advantages, the values' targets or None), [rows, length] each."""


def _for_tokens(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Advantages of completions [groups, size] for each of their tokens [rows, length]; 0 for other tokens."""
  return np.nan_to_num(advantages).reshape(-1, 1) * mask


def _mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean, count) of the scores of each group, [groups, 1] each, without those that abstained."""
  count = np.sum(~np.isnan(scores), axis=1, keepdims=True)
  return np.nansum(scores, axis=1, keepdims=True) / np.maximum(count, 1), count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Advantages):
  """GRPO: (score - mean) / standard deviation, both of the completion's group.

  Shao et al. (2024), arXiv:2402.03300, section 4.1.2. Equal scores have advantage 0.

  Attributes:
    scale: whether to divide by the standard deviation; Dr. GRPO (arXiv:2503.20783) does not.
  """

  scale: bool = True

  def __call__(self, batch):
    scores = batch.penalised
    mean, count = _mean(scores)
    advantages = scores - mean
    if self.scale:
      # The sample's standard deviation (n - 1) and this epsilon, as in TRL and Tunix.
      deviation = np.sqrt(
        np.nansum(advantages**2, axis=1, keepdims=True) / np.maximum(count - 1, 1)
      )
      equal = deviation < EQUAL
      advantages = np.where(equal, 0.0, advantages / np.where(equal, 1.0, deviation + 1e-6))
    return _for_tokens(advantages, batch.mask), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Advantages):
  """REINFORCE leave-one-out: score - mean score of the other completions of the group.

  Kool et al. (2019); Ahmadian et al. (2024), arXiv:2402.14740, equation 9.
  """

  def __call__(self, batch):
    scores = batch.penalised
    mean, count = _mean(scores)
    # score - (sum - score) / (n - 1) = (score - mean) n / (n - 1). A group of one has no others.
    advantages = np.where(count > 1, (scores - mean) * count / np.maximum(count - 1, 1), 0.0)
    return _for_tokens(advantages, batch.mask), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAE(Advantages):
  """Generalised advantage estimation, for PPO (Schulman et al. 2015, arXiv:1506.02438, equation 16).

  The reward of a token is its penalty; the last token of a completion gets the score too.

  Attributes:
    discount: gamma.
    trace: lambda; with 1 the advantage is the return less the value.
    whiten: whether all advantages of a round are scaled to mean 0 and variance 1.
  """

  discount: float = 1.0
  trace: float = 0.95
  whiten: bool = True

  reads_values = True

  def __post_init__(self):
    for field in ('discount', 'trace'):
      if not 0 <= getattr(self, field) <= 1:
        raise Invalid(GAE, field, f'{getattr(self, field)!r} must be from 0 to 1.')

  def __call__(self, batch):
    mask = np.asarray(batch.mask, np.float64)
    values = np.asarray(batch.values, np.float64)
    rewards = -np.asarray(batch.penalties, np.float64)
    scores = batch.scores.reshape(-1)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)
    rewards[np.arange(len(mask)), last] += np.nan_to_num(scores)
    advantages = np.zeros_like(values)
    # Of the token after t; behind the last token of a completion both are 0.
    next_advantage = np.zeros(len(mask))
    next_value = np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
      delta = rewards[:, t] + self.discount * next_value - values[:, t]
      advantage = delta + self.discount * self.trace * next_advantage
      inside = mask[:, t] > 0
      next_advantage = np.where(inside, advantage, next_advantage)
      next_value = np.where(inside, values[:, t], next_value)
      advantages[:, t] = next_advantage * inside
    returns = (advantages + values) * mask
    # A completion without a score teaches neither policy nor values: its values are their own targets.
    counted = mask * ~np.isnan(scores)[:, None]
    returns = np.where(counted > 0, returns, values * mask)
    if self.whiten:
      advantages = _whiten(advantages, counted)
    return advantages * counted, returns


def _whiten(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """x with mean 0 and variance 1 over the entries whose mask is 1."""
  total = max(mask.sum(), 2.0)
  mean = (x * mask).sum() / total
  variance = ((x - mean) ** 2 * mask).sum() / (total - 1)
  return (x - mean) / np.sqrt(variance + 1e-8)
