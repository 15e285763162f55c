"""What every design has: sizes by a ladder, hyper-parameters by rules, a plan and perhaps an answer.

A design yields `Planned` runs; it knows sizes and counts, and nothing of gin, training or machines.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from research.core.errors import Invalid
from research.designs.plan import Ladder, Planned, Rule, Size, nearest
from research.scaling.rows import CONVENTIONS


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a design says in the end.

  Attributes:
    text: for a terminal.
    figures: (matplotlib Figure, caption) by name.
    fit: what was fitted, as JSON values.
  """

  text: str
  figures: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  fit: Mapping | None = None

  def __str__(self) -> str:
    return self.text


class Design(Protocol):
  """Yields the runs of a sweep. `law`: whether they ask for a law of N and D; else `answer` is asked."""

  flops: str
  law: bool
  repeats: bool

  def rungs(self, count: Callable[[dict], object]) -> list[Size]: ...

  def plan(self, rungs: list[Size], length: int) -> list[Planned]: ...

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized:
  """What designs share: sizes by a ladder, hyper-parameters by rules.

  Attributes:
    ladder: where the sizes come from.
    learning_rate, batch_size: rules; batch_size in examples.
    flops: a FLOP convention of results rows; it says which parameters N counts.
    min_steps: a run with fewer updates is left out: it says more about warm-up than about size.
  """

  ladder: Ladder
  learning_rate: Rule
  batch_size: Rule
  flops: str = 'flops_6n_with_head'
  min_steps: int = 50
  law: ClassVar[bool] = True
  repeats: ClassVar[bool] = False  # whether the data are gone through more than once

  def __post_init__(self):
    if self.flops not in CONVENTIONS:
      raise Invalid(type(self), 'flops', f'{self.flops!r} is not one of {", ".join(CONVENTIONS)}.')

  def rungs(self, count: Callable[[dict], object]) -> list[Size]:
    """The ladder counted. `count(macros)` gives `counts.Counts` of that size."""
    sizes = []
    for macros in self.macros():
      c = count(macros)
      sizes.append(Size(macros, getattr(c, CONVENTIONS[self.flops]), getattr(c, self.flops)))
    return sizes

  def macros(self) -> list[dict[str, int]]:
    return self.ladder.macros()

  def train_for(
    self, tokens: float, size: Size, length: int, name: str, role: str = 'fit', **knobs
  ) -> Planned:
    """One run of `size` on `tokens`, to the nearest step; `knobs` replace fields of `Planned`."""
    facts = {'params': size.params, 'tokens': tokens, 'flops': tokens * size.flops_per_token}
    batch = knobs.pop('batch_size', max(1, round(self.batch_size(**facts))))
    steps = knobs.pop('steps', max(1, round(tokens / (batch * length))))
    rate = float(f'{knobs.pop("learning_rate", self.learning_rate(**facts)):.4g}')
    tokens = steps * batch * length
    budget = knobs.pop('budget', None)
    return Planned(name.replace('+', ''), role, budget, size, tokens, steps, batch, rate, **knobs)

  def long_enough(self, runs: list[Planned], field: str) -> list[Planned]:
    """The runs of `min_steps` or more."""
    kept = [run for run in runs if run.steps >= self.min_steps]
    if not kept:
      why = f'no run has {self.min_steps} steps or more; raise it, or lower batch_size.'
      raise Invalid(type(self), field, why)
    return kept

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    """What the rows say, for a design whose question is not the law of N and D."""
    raise NotImplementedError


def positive(design, **fields) -> None:
  """Raises Invalid for a tuple of numbers that is empty or not of positive ones."""
  for field, values in fields.items():
    if not isinstance(values, tuple) or not values or not all(v > 0 for v in values):
      why = f'{values!r} must be one or more positive numbers, in parentheses.'
      raise Invalid(type(design), field, why)


def losses(runs: list[Planned], rows: list[dict]) -> list[tuple[Planned, float]]:
  """The runs that have a loss, with it."""
  found = {row['run']: row.get('loss') for row in rows}
  return [(run, found[run.name]) for run in runs if found.get(run.name) is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picked(Sized):
  """A design of some sizes of its ladder.

  Attributes:
    params: N; the nearest rungs of the ladder are taken, each once.
  """

  params: tuple[float, ...]

  def __post_init__(self):
    super().__post_init__()
    positive(self, params=self.params)

  def sizes(self, rungs: list[Size]) -> list[Size]:
    return list({(size := nearest(rungs, n)).name: size for n in self.params}.values())
