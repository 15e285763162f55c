"""FIXME: say what this module is."""

import json

import jax

from research.core import storage
from research.training import loop


class _Member(loop._Loop):
  """The record of a member: its rows, its checkpoints and its fate. Its state is the population's."""

  def __init__(self, *args, size: int, sums):
    self.size, self.sums, self.status = size, sums, None
    super().__init__(*args)
    self.at = self.start

  @property
  def order(self) -> tuple[int, int]:
    """What the order of its batches follows from."""
    return self.run.seed, self.start

  def compile(self):
    pass  # for all members at once, and so is the state made

  def initial(self):
    return None

  def sum_losses(self, frozen) -> tuple[float, float]:
    return self.sums(frozen)

  def row(self, step: int, status: str) -> dict:
    row = super().row(step, status)
    devices = len(jax.sharding.get_mesh().devices.ravel())
    # A member's share of the time, so that the rows of a sweep add up.
    return {
      **row,
      'seconds': row['seconds'] / self.size,
      'devices': devices,
      'population': self.size,
    }

  def end(self, status: str) -> None:
    self.status = status
    row = self.row(self.at, status)
    storage.write_atomic(self.workdir / 'run.json', json.dumps(row, indent=1) + '\n')
    self.final = row
