"""Mixtures of streams and curricula of batches: descriptions, checked where they are made."""

import dataclasses

from research.core.errors import Invalid, did_you_mean
from research.data.streams import Stream


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Batches that grow, of rows that are short at first, over one order of examples.

  Attributes:
    batch_size: examples per step, once all stages are over.
    stages: (steps, batch size, cut) of each stage before that. Every example of length L counts as
      `cut` rows of L / cut, so a stage's batch is `batch size x cut` shorter rows.
  """

  batch_size: int
  stages: tuple[tuple[int, int, int], ...] = ()

  def at(self, step: int) -> tuple[int, int, int]:
    """(first example, batch size, cut) of a step, the first of which is 0."""
    first = 0
    for steps, size, cut in self.stages:
      if step < steps:
        return first + step * size, size, cut
      first, step = first + steps * size, step - steps
    return first + step * self.batch_size, self.batch_size, 1

  def examples(self, steps: int) -> int:
    """How many examples so many steps take."""
    return self.at(steps)[0]

  def sizes(self) -> list[tuple[int, int]]:
    """(batch size, cut) of every stage, and of the steps after them."""
    return [*((size, cut) for _, size, cut in self.stages), (self.batch_size, 1)]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several streams of one shape as one stream of training, each with its share of the examples.

  Attributes:
    streams: {name: Stream}, all with the same lengths, architecture and vocabulary.
    rates: {name: weight}; None takes each stream's number of examples.
    temperature: the weights are raised to 1/temperature (Raffel et al. 2020, section 3.5.2): 1 is
      proportional, large is equal.
    maximum: a weight counts as at most this before that (their artificial limit K); None for none.
  """

  streams: dict[str, Stream]
  rates: dict[str, float] | None = None
  temperature: float = 1.0
  maximum: float | None = None

  def __post_init__(self):
    if not self.streams or not all(isinstance(s, Stream) for s in self.streams.values()):
      raise Invalid(Mixture, 'streams', 'must be {name: @streams.Stream(), ...}.')
    if self.rates is not None:
      for name in self.rates:
        if name not in self.streams:
          hint = did_you_mean(name, self.streams)
          raise Invalid(Mixture, 'rates', f'{name!r} is no stream here.{hint}')
      bad = [n for n in self.streams if not self.rates.get(n, 0) > 0]
      if bad:
        raise Invalid(Mixture, 'rates', f'{bad[0]!r} needs a rate above 0.')
    if not self.temperature > 0:
      raise Invalid(Mixture, 'temperature', f'{self.temperature} must be positive.')
    first, *others = self.streams
    for other in others:
      for field in ('lengths', 'architecture'):
        got, want = (getattr(self.streams[n], field) for n in (other, first))
        if got != want:
          why = f'{other!r} has {field} {got}, and {first!r} has {want}.'
          raise Invalid(Mixture, 'streams', why)

  @property
  def name(self) -> str:
    return '+'.join(self.streams)

  @property
  def lengths(self) -> dict[str, int]:
    return next(iter(self.streams.values())).lengths

  def shares(self, examples: dict[str, int]) -> dict[str, float]:
    """{name: share} that sum to 1, given how many examples each stream has."""
    weights = {n: float((self.rates or examples)[n]) for n in self.streams}
    if self.maximum is not None:
      weights = {n: min(w, self.maximum) for n, w in weights.items()}
    weights = {n: w ** (1 / self.temperature) for n, w in weights.items()}
    return {n: w / sum(weights.values()) for n, w in weights.items()}
