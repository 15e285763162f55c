"""Mixtures of streams, and curricula of batches: dataclasses that check themselves."""

import dataclasses

from research.core.errors import Invalid, did_you_mean
from research.data.streams import Stream


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Batches that grow in size and in length of rows, over one order of examples.

  Attributes:
    batch_size: examples per step after the last stage.
    stages: (steps, batch size, cut) of each stage. A stage cuts every example of length L into `cut` rows
      of length L / cut, so its batch has `batch size x cut` rows.
  """

  batch_size: int
  stages: tuple[tuple[int, int, int], ...] = ()

  def at_step(self, step: int) -> tuple[int, int, int]:
    """Returns (first example, batch size, cut) of a step; steps count from 0."""
    first = 0
    for steps, size, cut in self.stages:
      if step < steps:
        return first + step * size, size, cut
      first += steps * size
      step -= steps
    return first + step * self.batch_size, self.batch_size, 1

  def examples(self, steps: int) -> int:
    """Returns how many examples the first `steps` steps read."""
    return self.at_step(steps)[0]

  def sizes(self) -> list[tuple[int, int]]:
    """Returns (batch size, cut) of every stage, and of the steps after the last stage."""
    return [*((size, cut) for _, size, cut in self.stages), (self.batch_size, 1)]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several streams of one shape mixed into one training stream, each with a share of the examples.

  Attributes:
    streams: {name: Stream}, all with the same lengths, architecture and vocabulary.
    rates: {name: weight}; None weighs each stream by its number of examples.
    temperature: the weights are raised to 1/temperature (Raffel et al. 2020, section 3.5.2): 1 leaves them,
      a large temperature makes them equal.
    maximum: larger weights count as this, before the temperature (the paper's artificial limit K); None for
      no limit.
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
          raise Invalid(Mixture, 'rates', f'{name!r} is not a stream of the mixture.{hint}')
      bad = [n for n in self.streams if not self.rates.get(n, 0) > 0]
      if bad:
        raise Invalid(Mixture, 'rates', f'{bad[0]!r} needs a rate above 0.')
    if not self.temperature > 0:
      raise Invalid(Mixture, 'temperature', f'{self.temperature} must be positive.')
    first, *others = self.streams
    for other in others:
      for field in ('lengths', 'architecture'):
        value = getattr(self.streams[other], field)
        expected = getattr(self.streams[first], field)
        if value != expected:
          why = f'{other!r} has {field} {value}, and {first!r} has {expected}.'
          raise Invalid(Mixture, 'streams', why)

  @property
  def name(self) -> str:
    return '+'.join(self.streams)

  @property
  def lengths(self) -> dict[str, int]:
    return next(iter(self.streams.values())).lengths

  def shares(self, examples: dict[str, int]) -> dict[str, float]:
    """Returns {name: share of the examples}, which sum to 1, for each stream's number of examples."""
    weights = {n: float((self.rates or examples)[n]) for n in self.streams}
    if self.maximum is not None:
      weights = {n: min(w, self.maximum) for n, w in weights.items()}
    weights = {n: w ** (1 / self.temperature) for n, w in weights.items()}
    return {n: w / sum(weights.values()) for n, w in weights.items()}


def streams_of(stream: Stream | Mixture) -> list[Stream]:
  """Returns the streams of a mixture, or a list of the stream itself."""
  return list(stream.streams.values()) if isinstance(stream, Mixture) else [stream]
