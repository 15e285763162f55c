"""A member of a population: its record, its status, and the functions that `over_members` applies to all.

Its parameters and optimizer state are one entry of the population's arrays.
"""

import dataclasses

import jax

from research.training.alike import inputs_of, with_inputs
from research.training.program import Program
from research.training.record import Record


@dataclasses.dataclass(frozen=True)
class MemberProgram:
  """The functions of one member. Each takes the member's own arguments, and those that all members share."""

  program: Program

  def init(self, varying: dict, initial: dict) -> dict:
    # Keys are passed as integers, which can be sharded and stacked like all other arrays.
    return self.program.init(jax.random.wrap_key_data(varying['key']), initial)

  def step(self, varying: dict, shared: dict) -> tuple[dict, dict]:
    program = self.program
    if varying['inputs']:
      values = {**inputs_of(program.run), **varying['inputs']}
      program = dataclasses.replace(program, run=with_inputs(program.run, values))
    batch = varying['batch'] or shared['batch']
    return program.step(varying['state'], batch, varying['rate'], shared['fixed'])

  def evaluate(self, varying: dict, shared: dict) -> dict:
    return self.program.evaluate(varying['params'], shared['batch'], shared['fixed'])


class Member:
  """One run of a population.

  Attributes:
    step: the step that it has reached.
    status: None while it is in training; then 'finished' or 'nan'.
    final: its row of results, once it has ended.
  """

  def __init__(self, record: Record, population: int):
    self.record = record
    self.run = record.run
    self.population = population
    self.step = record.start
    self.status: str | None = None
    self.final: dict | None = None

  @property
  def order(self) -> tuple[int, int]:
    """What decides the order of its batches: the seed, and the step that it continues from."""
    return self.run.seed, self.record.start

  def end(self, status: str) -> None:
    """Sets the status and writes the member's row of results."""
    self.status = status
    row = self.record.row(self.step, status)
    # Each member counts its share of the time, so that the times of a sweep's rows add up.
    row['seconds'] /= self.population
    row['devices'] = jax.sharding.get_mesh().size
    row['population'] = self.population
    self.record.write_row(row)
    self.final = row
