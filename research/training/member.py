"""A member of a population: one run's record and its fate. Its state is an entry of the population's arrays."""

import jax

from research.training.record import Record


class Member:
  """One run of a population.

  Attributes:
    at: the step that it has reached.
    status: None while it is in training; then 'finished' or 'nan'.
    final: its row, once it has ended.
  """

  def __init__(self, record: Record, population: int):
    self.record = record
    self.run = record.run
    self.population = population
    self.at = record.start
    self.status: str | None = None
    self.final: dict | None = None

  @property
  def order(self) -> tuple[int, int]:
    """What the order of its batches follows from: the seed, and the step that it continues from."""
    return self.run.seed, self.record.start

  def end(self, status: str) -> None:
    """Writes the member's row."""
    self.status = status
    row = self.record.row(self.at, status)
    # A member's share of the time, so that the rows of a sweep add up.
    row['seconds'] /= self.population
    row['devices'] = jax.sharding.get_mesh().size
    row['population'] = self.population
    self.record.write_row(row)
    self.final = row
