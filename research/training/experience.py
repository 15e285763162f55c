"""The interface of training rows that the model itself generates. `research.reinforcement` implements it.

Training knows no sampler and no reward, so a gin file binds what generates the rows in place of a stream:

    Run.train = @rollouts.Rollouts()
"""

import abc
from collections.abc import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


class Experience(abc.ABC):
  """A source of training rows that replaces a frozen stream.

  Attributes:
    name: the name of the task, which stands in the run's row of results.
    lengths: tokens per row, by seqio task feature, as in a stream.
    round_steps: updates per round of generated rows. A run stops and saves only between rounds, so a checkpoint
      holds no rows: its parameters generate the next ones.
  """

  name: str
  lengths: dict[str, int]
  round_steps: int

  @abc.abstractmethod
  def shapes(self, length: int) -> dict[str, tuple]:
    """Returns {key: (shape of a row, dtype)} of the arrays that a row holds beside its tokens."""

  @abc.abstractmethod
  def open(self, run) -> 'Opened':
    """Prepares to generate rows for a run.

    Raises:
      Invalid: it does not suit the run.
    """


class Opened(abc.ABC):
  """The `Experience` of one run, with the methods of a frozen stream that the training loop needs.

  Attributes:
    vocab_size: the highest token id plus one.
    features: {key: (shape of a row, dtype)}.
    manifest: has the key 'vocabulary', as the manifest of a frozen stream does.
  """

  vocab_size: int
  features: dict[str, tuple]
  manifest: dict

  def empty(self, rows: int) -> Batch:
    """Returns a batch of zeros. The step is compiled for its shapes before the first batch exists."""
    return {key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in self.features.items()}

  @abc.abstractmethod
  def batches(
    self, program, start: int, params: Callable[[], dict]
  ) -> Iterator[tuple[Batch, dict[str, float]]]:
    """Yields (batch, its metrics by name) for every step from `start` on, without end.

    Args:
      program: the run's `training.program.Program`.
      start: the number of steps done so far.
      params: returns all current parameters, on the mesh in use.
    """

  @abc.abstractmethod
  def epochs(self, examples: int) -> dict[str, float]:
    """Returns {name: passes over the prompts} after training on `examples` rows."""

  @abc.abstractmethod
  def state(self) -> dict:
    """Returns JSON values for the checkpoint: what the next round needs beside parameters, seed and step."""

  @abc.abstractmethod
  def restore(self, state: dict) -> None:
    """Continues from what `state` returned."""
