"""The description of what a model says of a stream's examples; `research.training.scores` has the ways."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Base of what is frozen beside a stream.

  Class attributes:
    keys: of the features that it adds to a row.

  Attributes:
    batch_size: rows that are scored at a time.
  """

  batch_size: int = 64

  keys: ClassVar[tuple[str, ...]]

  def described(self) -> dict:
    """What decides the features, JSON-able."""
    raise NotImplementedError

  def shapes(self, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of the features in a row of `length` tokens, by key."""
    raise NotImplementedError

  def scorer(self) -> Callable[[Batch], Batch]:
    """The function of a batch that gives the features [batch, length, ...] of `keys`."""
    raise NotImplementedError

  def facts(self, rows: Batch) -> dict[str, float]:
    """Sums over rows with their features that a person should be told, and their 'weight'."""
    return {'weight': float(rows['decoder_loss_weights'].sum())}

  def told(self, facts: dict[str, float]) -> str:
    """`facts` over the whole stream in words; empty for nothing to tell."""
    return ''
