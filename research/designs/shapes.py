"""Width against depth at one budget: which shape is best."""

import dataclasses
from typing import ClassVar

from research.designs.base import Answer, Sized, losses, positive
from research.designs.plan import Planned, Size


def shapes(runs: list[Planned], rows: list[dict]) -> Answer:
  """The loss of every width and depth, and the best of them."""
  from research.designs import charts

  macros = lambda run: (run.size.macros['EMBED'], run.size.macros['LAYERS'])
  found = {macros(run): loss for run, loss in losses(runs, rows)}
  widths, depths = (sorted({macros(run)[i] for run in runs}) for i in (0, 1))
  show = lambda loss: f'{loss:8.4f}' if loss is not None else f'{"-":>8}'
  lines = ['width    ' + ''.join(f'{d:6} L ' for d in depths)]
  lines += [f'{w:8}' + ' '.join(show(found.get((w, d))) for d in depths) for w in widths]
  if not found:
    return Answer('\n'.join(lines))
  (width, depth), loss = min(found.items(), key=lambda item: item[1])
  lines.append(f'best: {width} wide, {depth} layers ({width / depth:.3g} wide a layer): {loss:.4f}')
  caption = 'Every run spends the same compute: a larger model sees fewer tokens.'
  return Answer('\n'.join(lines), {'shapes': (charts.shapes(found), caption)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthDepth(Sized):
  """Widths x depths, each trained on one budget: what shape is best (Kaplan 2020, section 3.1).

  Attributes:
    budget: C in FLOPs of every run.
    depths: numbers of layers; the widths are the ladder's.
  """

  budget: float
  depths: tuple[int, ...]
  law: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    positive(self, depths=self.depths, budget=(self.budget,))

  def macros(self) -> list[dict[str, int]]:
    widths = self.ladder.macros()
    return [{**macros, 'LAYERS': depth} for macros in widths for depth in self.depths]

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = [
      self.train_for(
        self.budget / size.flops_per_token, size, length, f'fit-{size.name}', budget=self.budget
      )
      for size in rungs
    ]
    return self.long_enough(runs, 'budget')

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    return shapes(runs, rows)
