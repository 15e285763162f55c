"""Grids of sizes by tokens (Kaplan et al. 2020) and of sizes by horizons (Hoffmann et al. 2022, approach 1)."""

import dataclasses

from research.designs.base import Picked, positive
from research.designs.plan import Planned, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaplanGrid(Picked):
  """N x D: every size on every number of tokens, each with a schedule of its own (Kaplan 2020, section 4).

  Attributes:
    tokens: D.
  """

  tokens: tuple[float, ...]

  def __post_init__(self):
    super().__post_init__()
    positive(self, tokens=self.tokens)

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = [
      self.train_for(tokens, size, length, f'fit-{size.name}-{tokens:.2e}')
      for size in self.sizes(rungs)
      for tokens in self.tokens
    ]
    return self.long_enough(runs, 'tokens')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Horizons(Picked):
  """Sizes x horizons in tokens per parameter, each a run of its own: Hoffmann 2022, approach 1.

  Attributes:
    horizons: D / N of the runs of each size.
  """

  horizons: tuple[float, ...]

  def __post_init__(self):
    super().__post_init__()
    positive(self, horizons=self.horizons)

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = [
      self.train_for(ratio * size.params, size, length, f'fit-{size.name}-{ratio:g}')
      for size in self.sizes(rungs)
      for ratio in self.horizons
    ]
    return self.long_enough(runs, 'horizons')
