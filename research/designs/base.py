"""The base of every design: sizes from a ladder, hyper-parameters by rules, a plan, and for some an answer.

A design yields `Planned` runs. It knows sizes and counts, but not gin, training or machines.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from research.core.errors import Invalid
from research.designs.plan import Ladder, Planned, Rule, Size, nearest
from research.scaling.rows import CONVENTIONS


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer of a design to its question.

  Attributes:
    text: for a terminal.
    figures: {name: (matplotlib Figure, caption)}.
    fit: the fitted values, JSON-able.
    columns: {run: {column: value}} to add to the rows in results.csv.
  """

  text: str
  figures: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  fit: Mapping | None = None
  columns: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return self.text


class Design(Protocol):
  """The runs of a sweep.

  Attributes:
    flops: the convention of C; it decides which parameters N counts.
    law: whether the rows are fitted by a law of N and D; otherwise `answer` reads them.
    repeats: whether a run may read its data more than once.
  """

  flops: str
  law: bool
  repeats: bool

  def rungs(self, count: Callable[[dict], object]) -> list[Size]: ...

  def plan(self, rungs: list[Size], length: int) -> list[Planned]: ...

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized:
  """A design with sizes from a ladder and hyper-parameters by rules.

  Attributes:
    ladder: the sizes.
    learning_rate, batch_size: rules; batch_size in examples.
    flops: the convention of C, a column of the results; it decides which parameters N counts.
    min_steps: runs with fewer updates are left out, because they measure the warm-up more than the size.
  """

  ladder: Ladder
  learning_rate: Rule
  batch_size: Rule
  flops: str = 'flops_6n_with_head'
  min_steps: int = 50
  law: ClassVar[bool] = True
  repeats: ClassVar[bool] = False

  def __post_init__(self):
    if self.flops not in CONVENTIONS:
      raise Invalid(type(self), 'flops', f'{self.flops!r} is not one of {", ".join(CONVENTIONS)}.')

  def rungs(self, count: Callable[[dict], object]) -> list[Size]:
    """The sizes of the ladder with their counts. `count(macros)` gives the `counts.Counts` of a size."""
    sizes = []
    for macros in self.macros():
      counts = count(macros)
      params = getattr(counts, CONVENTIONS[self.flops])
      sizes.append(Size(macros, params, flops_per_token=getattr(counts, self.flops)))
    return sizes

  def macros(self) -> list[dict[str, int]]:
    """The gin macros of each size; a design may make others than the ladder's."""
    return self.ladder.macros()

  def train_for(
    self, tokens: float, size: Size, length: int, name: str, role: str = 'fit', **knobs
  ) -> Planned:
    """A run of `size` on `tokens`, rounded to whole steps; `knobs` replace fields of `Planned`."""
    facts = {'params': size.params, 'tokens': tokens, 'flops': tokens * size.flops_per_token}
    batch = knobs.pop('batch_size', max(1, round(self.batch_size(**facts))))
    steps = knobs.pop('steps', max(1, round(tokens / (batch * length))))
    rate = float(f'{knobs.pop("learning_rate", self.learning_rate(**facts)):.4g}')
    tokens = steps * batch * length
    budget = knobs.pop('budget', None)
    return Planned(name.replace('+', ''), role, budget, size, tokens, steps, batch, rate, **knobs)

  def long_enough(self, runs: list[Planned], field: str) -> list[Planned]:
    """The runs of `min_steps` or more."""
    long = [run for run in runs if run.steps >= self.min_steps]
    if not long:
      why = f'no run has {self.min_steps} steps or more; raise it, or lower batch_size.'
      raise Invalid(type(self), field, why)
    return long

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    """The answer in the rows of a design that asks for no law of N and D."""
    raise NotImplementedError


def positive(design, **fields) -> None:
  """Raises Invalid for a field that is not a tuple of one or more positive numbers."""
  for field, values in fields.items():
    if not isinstance(values, tuple) or not values or not all(v > 0 for v in values):
      why = f'{values!r} must be one or more positive numbers, in parentheses.'
      raise Invalid(type(design), field, why)


def losses(runs: list[Planned], rows: list[dict]) -> list[tuple[Planned, float]]:
  """(run, its loss) of the runs that have a loss."""
  loss_of = {row['run']: row.get('loss') for row in rows}
  return [(run, loss_of[run.name]) for run in runs if loss_of.get(run.name) is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picked(Sized):
  """A design of chosen sizes of its ladder.

  Attributes:
    params: N; each takes the nearest size of the ladder, and no size is taken twice.
  """

  params: tuple[float, ...]

  def __post_init__(self):
    super().__post_init__()
    positive(self, params=self.params)

  def sizes(self, rungs: list[Size]) -> list[Size]:
    """The size nearest to each of `params`, without repeats."""
    return list({(size := nearest(rungs, n)).name: size for n in self.params}.values())
