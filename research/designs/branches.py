"""Many horizons of one run: a trunk at a constant rate and a decay for each horizon."""

import dataclasses

from research.core.errors import Invalid
from research.designs.base import Picked, positive
from research.designs.plan import Planned, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches(Picked):
  """Many horizons of one run: a trunk at a constant rate, and a decay from its checkpoints for each horizon.

  k horizons cost the stable phase of the longest and k decays (Hu et al. 2024, arXiv:2404.06395; Hägele et al.
  2024, arXiv:2405.18392). A branch equals, to the bit, the same run trained alone. The schedule must be
  `schedules.warmup_stable_decay`.

  Attributes:
    shortest: tokens per parameter of the first horizon.
    horizons: the stable phases as whole multiples of the first.
    decay: the fraction of a horizon that is decay.
    warmup: the fraction of the first horizon that is warm-up.
  """

  shortest: float
  horizons: tuple[int, ...] = (1, 2, 4, 8)
  decay: float = 0.2
  warmup: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    positive(self, horizons=self.horizons)
    if any(not isinstance(h, int) for h in self.horizons):
      raise Invalid(Branches, 'horizons', f'{self.horizons!r} must be whole numbers.')
    if not 0 < self.decay < 1 or not 0 <= self.warmup < 1 - self.decay:
      raise Invalid(Branches, 'decay', f'{self.decay!r} and warmup must leave a stable phase.')

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = []
    for size in self.sizes(rungs):
      first = self.train_for(self.shortest * size.params, size, length, 'first')
      if first.steps < self.min_steps:
        raise Invalid(Branches, 'shortest', f'{size.name} gets {first.steps} steps; raise it.')
      unit = max(1, round(first.steps * (1 - self.decay)))
      runs += self._trunk_and_branches(first, unit, length)
    return runs

  def _trunk_and_branches(self, first: Planned, unit: int, length: int) -> list[Planned]:
    """The runs of one size. `unit`: the stable steps of the first horizon."""
    size = first.size
    warmup = max(1, round(self.warmup * first.steps))
    trunk = f'trunk-{size.name}'

    def run(name: str, steps: int, decay: float, *settings: str, **fields) -> Planned:
      settings = (
        f'warmup_stable_decay.warmup={warmup}',
        f'warmup_stable_decay.decay={decay}',
        *settings,
      )
      # One rate and one batch size for all: up to the fork, a branch is the trunk.
      return self.train_for(
        steps * first.batch_size * length, size, length, name, steps=steps, settings=settings,
        learning_rate=first.learning_rate, batch_size=first.batch_size, **fields,
      )  # fmt: skip

    saved = (f'Run.checkpoint_every={unit}', f'Run.keep_checkpoints={max(self.horizons)}')
    runs = [run(trunk, unit * max(self.horizons), 0.0, *saved, role='trunk')]
    for horizon in self.horizons:
      fork = unit * horizon
      steps = max(fork + 1, round(fork / (1 - self.decay)))
      name = f'fit-{size.name}-{horizon}'
      runs.append(run(name, steps, (steps - fork) / steps, parent=trunk, fork=fork))
    return runs
