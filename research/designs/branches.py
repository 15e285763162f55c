"""Many horizons of one run: a trunk at a constant rate and a decay for each horizon."""

import dataclasses

from research.core.errors import Invalid
from research.designs.base import Picked, positive
from research.designs.plan import Planned, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches(Picked):
  """Many horizons of one run: a trunk at a constant rate, and from its checkpoints a decay for each horizon.

  k horizons cost the longest's stable phase and k decays (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024,
  arXiv:2405.18392). A branch is to the bit the run trained alone on the same schedule, which must be
  `schedules.warmup_stable_decay`.

  Attributes:
    shortest: tokens per parameter of the first horizon.
    horizons: the stable phases as whole multiples of the first.
    decay: share of a horizon that is the decay.
    warmup: share of the first horizon that is the warm-up.
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
      warmup = max(1, round(self.warmup * first.steps))
      schedule = lambda decay, warmup=warmup: (
        f'warmup_stable_decay.warmup={warmup}',
        f'warmup_stable_decay.decay={decay}',
      )
      # The same rate and batch for all: they are one run as long as they are together.
      same = {'learning_rate': first.learning_rate, 'batch_size': first.batch_size}
      at = lambda steps, size=size, first=first: {
        'tokens': steps * first.batch_size * length, 'size': size, 'length': length, 'steps': steps
      }  # fmt: skip
      saved = (f'Run.checkpoint_every={unit}', f'Run.keep_checkpoints={max(self.horizons)}')
      trunk = f'trunk-{size.name}'
      stable = unit * max(self.horizons)
      settings = (*schedule(0.0), *saved)
      runs.append(self.train_for(**at(stable), name=trunk, role='trunk', settings=settings, **same))
      for horizon in self.horizons:
        fork = unit * horizon
        steps = max(fork + 1, round(fork / (1 - self.decay)))
        decay = (steps - fork) / steps
        runs.append(
          self.train_for(
            **at(steps), name=f'fit-{size.name}-{horizon}', settings=schedule(decay), parent=trunk,
            fork=fork, **same,
          )
        )  # fmt: skip
    return runs
