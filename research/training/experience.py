"""Rows that a model makes itself as it learns: the interface that `research.reinforcement` fulfils.

Training knows no sampler and no reward. A gin file binds whatever makes the rows in the place of a stream:

    Run.train = @rollouts.Rollouts()
"""

import abc
from collections.abc import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


class Experience(abc.ABC):
  """What a run trains on, where no stream is frozen beforehand.

  Attributes:
    name: of the run's task, for its row.
    lengths: tokens per row, by seqio task feature, as of a stream.
    round_steps: updates between two rounds of rows. A run stops and saves only between rounds, so a checkpoint
      needs no rows: the next ones are made of its parameters.
  """

  name: str
  lengths: dict[str, int]
  round_steps: int

  @abc.abstractmethod
  def shapes(self, length: int) -> dict[str, tuple]:
    """{key: (shape of a row, dtype)} of what a row holds beside its tokens."""

  @abc.abstractmethod
  def open(self, run) -> 'Opened':
    """What makes the rows of a run.

    Raises:
      Invalid: it does not suit the run.
    """


class Opened(abc.ABC):
  """An `Experience` of one run; it has what the loop asks of a frozen stream.

  Attributes:
    vocab_size: one more than the highest token id.
    features: {key: (shape of a row, dtype)}.
    manifest: says the 'vocabulary', as a frozen stream's does.
  """

  vocab_size: int
  features: dict[str, tuple]
  manifest: dict

  def empty(self, rows: int) -> Batch:
    """A batch of nothing, which a step is compiled for: there is no first batch yet."""
    return {key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in self.features.items()}

  @abc.abstractmethod
  def batches(
    self, program, start: int, params: Callable[[], dict]
  ) -> Iterator[tuple[Batch, dict[str, float]]]:
    """Without end (batch, what a row of metrics says of it), from step `start` on.

    Args:
      program: the run's `training.program.Program`.
      params: gives all parameters of now, on the mesh in use.
    """

  @abc.abstractmethod
  def epochs(self, examples: int) -> dict[str, float]:
    """{name: passes over the prompts} after training on so many rows."""

  @abc.abstractmethod
  def state(self) -> dict:
    """What else the next round depends on, beside parameters, seed and step: JSON values for a checkpoint."""

  @abc.abstractmethod
  def restore(self, state: dict) -> None:
    """Goes on from what `state` gave."""
