"""The KL penalty: a part of the reward, with a weight that may adapt."""

import dataclasses

from research.core.errors import Invalid


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL:
  """Subtracts weight x (ln policy - ln reference) from the reward at every token.

  Ziegler et al. (2019), arXiv:1909.08593, section 2.2: after every round the weight is multiplied by
  1 + clip(KL / target - 1, -0.2, 0.2) x completions / horizon.

  Attributes:
    weight: the first one.
    target: the KL divergence to keep, in nats per completion; None keeps the weight.
    horizon: the weight changes by at most a fifth over so many completions.
  """

  weight: float = 0.05
  target: float | None = None
  horizon: int = 10_000

  def __post_init__(self):
    if not self.weight >= 0:
      raise Invalid(KL, 'weight', f'{self.weight!r} must be 0 or more.')
    if self.target is not None and not self.target > 0:
      raise Invalid(KL, 'target', f'{self.target!r} must be above 0, or None.')
    if self.horizon < 1:
      raise Invalid(KL, 'horizon', f'{self.horizon!r} must be 1 or more.')

  def adapted(self, weight: float, divergence: float, completions: int) -> float:
    """The weight after a round.

    Args:
      divergence: the round's mean KL divergence, in nats per completion.
      completions: of the round.
    """
    if self.target is None:
      return weight
    error = min(max(divergence / self.target - 1, -0.2), 0.2)
    return weight * (1 + error * completions / self.horizon)
