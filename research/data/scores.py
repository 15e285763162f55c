"""The interface of a model's scores of a stream's examples. `research.training.scores` implements it."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Base class of scores.

  Class attributes:
    keys: the keys of the features that it adds to a row.

  Attributes:
    batch_size: rows that are scored at once.
  """

  batch_size: int = 64

  keys: ClassVar[tuple[str, ...]]

  def described(self) -> dict:
    """Returns everything that decides the scores, as JSON values."""
    raise NotImplementedError

  def shapes(self, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns (shape, dtype) of the features of a row of `length` tokens, by key."""
    raise NotImplementedError

  def scorer(self) -> Callable[[Batch], Batch]:
    """Returns the function from a batch to the features of `keys`, [batch, length, ...]."""
    raise NotImplementedError

  def facts(self, rows: Batch) -> dict[str, float]:
    """Returns sums over rows with their features, for `summary`, and their 'weight'."""
    return {'weight': float(rows['decoder_loss_weights'].sum())}

  def summary(self, facts: dict[str, float]) -> str:
    """Returns the `facts` of the whole stream in words; empty if there is nothing to say."""
    return ''
