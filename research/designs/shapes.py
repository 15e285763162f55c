"""Width against depth at one budget: the best shape."""

import dataclasses
from typing import ClassVar

from research.designs.base import Answer, Sized, losses, positive
from research.designs.plan import Planned, Size


def shapes(runs: list[Planned], rows: list[dict]) -> Answer:
  """The loss of every width and depth, and the best of them."""
  from research.designs import charts

  def shape(run: Planned) -> tuple[int, int]:
    return run.size.macros['EMBED'], run.size.macros['LAYERS']

  loss_of = {shape(run): loss for run, loss in losses(runs, rows)}
  widths = sorted({shape(run)[0] for run in runs})
  depths = sorted({shape(run)[1] for run in runs})
  lines = ['width    ' + ''.join(f'{depth:6} L ' for depth in depths)]
  for width in widths:
    cells = [loss_of.get((width, depth)) for depth in depths]
    shown = [f'{"-":>8}' if loss is None else f'{loss:8.4f}' for loss in cells]
    lines.append(f'{width:8}' + ' '.join(shown))
  if not loss_of:
    return Answer('\n'.join(lines))
  width, depth = min(loss_of, key=loss_of.get)
  loss = loss_of[width, depth]
  lines.append(f'best: {width} wide, {depth} layers ({width / depth:.3g} wide a layer): {loss:.4f}')
  caption = 'Every run spends the same compute: a larger model sees fewer tokens.'
  return Answer('\n'.join(lines), {'shapes': (charts.shapes(loss_of), caption)})


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
