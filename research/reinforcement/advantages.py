"""How much better a completion, or one of its tokens, was than expected: host arrays, in float64.

A score is NaN where the reward abstained. It is left out of the means, and its advantage is 0.
"""

import abc
import dataclasses

import numpy as np

from research.core.errors import Invalid

# Scores that differ by less are equal: what is left is rounding, and dividing by it would make it a signal.
EQUAL = 1e-6


@dataclasses.dataclass(frozen=True)
class Round:
  """What advantages are made of: rows [rows, length], groups of completions of one prompt side by side.

  Attributes:
    scores: [groups, size], NaN where the reward abstained.
    penalties: [rows, length], what is taken off the reward at each token (`penalty.KL`); 0 outside completions.
    mask: [rows, length], 1 on the tokens of completions.
    values: [rows, length], expected before each token; None without a head of values.
  """

  scores: np.ndarray
  penalties: np.ndarray
  mask: np.ndarray
  values: np.ndarray | None = None

  @property
  def penalised(self) -> np.ndarray:
    """The scores [groups, size] less all that is taken off."""
    return self.scores - self.penalties.sum(1).reshape(self.scores.shape)


class Advantages(abc.ABC):
  """Base of the ways. `reads_values` says whether the model needs a head of values."""

  reads_values = False

  @abc.abstractmethod
  def __call__(self, batch: Round) -> tuple[np.ndarray, np.ndarray | None]:
    """(advantages, what values should have been or None), [rows, length] each."""


def _to_rows(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Of groups [groups, size], for every token of a completion; 0 where there is none."""
  return np.nan_to_num(advantages).reshape(-1, 1) * mask


def _mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean, number) of the scores of each group [groups, 1] that are there."""
  count = np.sum(~np.isnan(scores), axis=1, keepdims=True)
  return np.nansum(scores, axis=1, keepdims=True) / np.maximum(count, 1), count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Advantages):
  """Score - mean of its group, divided by the group's standard deviation: GRPO.

  Shao et al. (2024), arXiv:2402.03300, section 4.1.2. Equal scores have advantage 0.

  Attributes:
    scale: whether to divide; Dr. GRPO (arXiv:2503.20783) does not.
  """

  scale: bool = True

  def __call__(self, batch):
    scores = batch.penalised
    mean, count = _mean(scores)
    advantages = scores - mean
    if self.scale:
      # The sample's deviation, as TRL and Tunix compute it.
      deviation = np.sqrt(
        np.nansum(advantages**2, axis=1, keepdims=True) / np.maximum(count - 1, 1)
      )
      equal = deviation < EQUAL
      advantages = np.where(equal, 0.0, advantages / np.where(equal, 1.0, deviation + 1e-6))
    return _to_rows(advantages, batch.mask), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Advantages):
  """Score - mean of the others of its group: REINFORCE leave-one-out.

  Kool et al. (2019); Ahmadian et al. (2024), arXiv:2402.14740, equation 9.
  """

  def __call__(self, batch):
    scores = batch.penalised
    mean, count = _mean(scores)
    # score - (sum - score) / (n - 1) = (score - mean) n / (n - 1); a group of one has nothing to compare with.
    advantages = np.where(count > 1, (scores - mean) * count / np.maximum(count - 1, 1), 0.0)
    return _to_rows(advantages, batch.mask), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAE(Advantages):
  """Generalised advantage estimation, for PPO (Schulman et al. 2015, arXiv:1506.02438, equation 16).

  The score comes with a completion's last token. All advantages of a round are whitened: mean 0, variance 1.

  Attributes:
    discount: gamma.
    trace: lambda; 1 takes the return less the value.
    whiten: whether to.
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
    judged = ~np.isnan(batch.scores.reshape(-1))
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)
    rewards[np.arange(len(mask)), last] += np.nan_to_num(batch.scores.reshape(-1))
    advantages = np.zeros_like(values)
    later, after = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
      delta = rewards[:, t] + self.discount * after - values[:, t]
      advantage = delta + self.discount * self.trace * later
      inside = mask[:, t] > 0
      later = np.where(inside, advantage, later)
      after = np.where(inside, values[:, t], after)
      advantages[:, t] = later * inside
    returns = (advantages + values) * mask
    counted = mask * judged[:, None]
    # A completion that nobody judged pulls the values nowhere.
    returns = np.where(counted > 0, returns, values * mask)
    if self.whiten:
      advantages = _whitened(advantages, counted)
    return advantages * counted, returns


def _whitened(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Mean 0 and variance 1 where the mask is 1."""
  total = max(mask.sum(), 2.0)
  mean = (x * mask).sum() / total
  variance = ((x - mean) ** 2 * mask).sum() / (total - 1)
  return (x - mean) / np.sqrt(variance + 1e-8)
