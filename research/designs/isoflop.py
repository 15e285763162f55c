"""IsoFLOP: sizes around the expected optimum of every budget."""

import dataclasses
import math

from research.core.errors import Invalid
from research.designs.base import Sized
from research.designs.plan import Planned, Size, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoFlop(Sized):
  """Budgets x sizes around the expected optimum of each budget, trained for as many tokens as the budget buys.

  The expected optimum has `ratio` tokens per parameter (Hoffmann 2022: about 20). The sizes are those of the
  ladder nearest to the optimum times `spread`^-1 .. `spread`, evenly in the logarithm. The first fit may move
  the optimum: check that the minimum of every budget lies inside its sizes.

  Attributes:
    budgets: C in FLOPs, by the convention `flops`.
    sizes: number of sizes per budget.
    seeds: number of runs of each size, with Run.seed 0, 1, ...; one number, or one for each budget. A second
      seed helps a forecast most at the largest budget.
  """

  budgets: tuple[float, ...]
  sizes: int = 5
  spread: float = 4.0
  ratio: float = 20.0
  seeds: int | tuple[int, ...] = 1

  def __post_init__(self):
    super().__post_init__()
    seeds = self.seeds if isinstance(self.seeds, tuple) else (self.seeds,)
    if len(seeds) not in (1, len(self.budgets)) or not all(n >= 1 for n in seeds):
      why = f'{self.seeds!r} must be a positive number, or one for each of the {len(self.budgets)} budgets.'
      raise Invalid(IsoFlop, 'seeds', why)
    if not self.budgets or not all(b > 0 for b in self.budgets):
      raise Invalid(
        IsoFlop, 'budgets', f'{self.budgets!r} must be one or more positive numbers of FLOPs.'
      )
    if self.sizes < 3:
      raise Invalid(IsoFlop, 'sizes', f'{self.sizes} sizes do not show a minimum; take at least 3.')
    if not self.spread > 1:
      raise Invalid(IsoFlop, 'spread', f'{self.spread!r} must be above 1.')

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    """The runs of the fit, cheapest budget first. `length` is target tokens per example."""
    runs = []
    seeds = self.seeds if isinstance(self.seeds, tuple) else (self.seeds,) * len(self.budgets)
    for budget, n in zip(self.budgets, seeds, strict=True):
      centre = math.sqrt(budget / 6 / self.ratio)
      steps = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
      chosen = {nearest(rungs, centre * self.spread**s).name: None for s in steps}
      sizes = [rung for rung in rungs if rung.name in chosen]
      planned = [self.run(budget, size, length, 'fit') for size in sizes]
      planned = [run for run in planned if run.steps >= self.min_steps]
      if len(planned) < 3:
        raise Invalid(
          IsoFlop, 'budgets',
          f'{budget:.3g} FLOPs leave {len(planned)} sizes of this ladder with {self.min_steps} '
          'steps or more; widen the ladder, lower batch_size, or raise the budget.',
        )  # fmt: skip
      runs += [
        self.run(budget, run.size, length, 'fit', seed) for run in planned for seed in range(n)
      ]
    return runs

  def run(self, budget: float, size: Size, length: int, role: str, seed: int = 0) -> Planned:
    """One run that spends `budget` on `size`."""
    name = f'{role}-{budget:.2e}-{size.name}' + (f'-seed{seed}' if seed else '')
    knobs = {'budget': budget, 'settings': (f'Run.seed={seed}',) if seed else ()}
    return self.train_for(budget / size.flops_per_token, size, length, name, role, **knobs)
