"""How to fit rows: the options that every kind of fit shares."""

import dataclasses
from collections.abc import Mapping

from research.scaling.laws.base import Law
from research.scaling.laws.loss import Chinchilla

CHINCHILLA = Chinchilla()


@dataclasses.dataclass(frozen=True)
class Options:
  """How to fit rows. `fit_results` has the same arguments and says what each means."""

  law: Law = CHINCHILLA
  profile: str = 'parabola'
  noise: float | None = None
  drop_highest: int = 0
  robust: str | None = None
  delta: float = 1e-3
  tau: float = 0.5
  starts: str | Mapping = 'grid'
  residuals: str | None = None
  fixed: Mapping[str, float] | None = None
  tied: Mapping[str, str] | None = None
  resample: str | None = None
  replicates: int = 1000
  level: float = 0.9
  seed: int = 0
  rule: str | None = None
  # How many examples an output that is a share (an accuracy) is measured on: a number, or the name of a column.
  examples: float | str | None = None
  # False to report parameters that the rows do not determine instead of an error, as some published fits need.
  check: bool = True

  def of_the_law(self) -> dict:
    """The arguments of `law_fit.fit`."""
    names = ('robust', 'delta', 'tau', 'starts', 'residuals', 'fixed', 'tied', 'check')
    return {name: getattr(self, name) for name in names}
