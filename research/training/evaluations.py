"""The interface of evaluations that a run does as it trains. `research.evaluation` implements it.

Training knows no task and no tokenizer, so a gin file binds the evaluations:

    Run.evaluations = (@suite.Suite(),)
"""

import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Evaluation(Protocol):
  """Measures what a model can do.

  Attributes:
    name: the name of its folder, unique among the evaluations of a run.
    labels: the names of its tasks. Its columns are eval/<label>/<metric>.
    during: True to evaluate at each validation of the run, False to evaluate only at its end.
  """

  name: str
  labels: tuple[str, ...]
  during: bool

  def columns(
    self, run, params: dict, step: int, folder: pathlib.Path, log: Callable[[str], None]
  ) -> dict[str, float | int | str]:
    """Evaluates the parameters and returns the results by column.

    It reuses the results that an earlier call left in the folder.

    Args:
      run: the `training.run.Run`.
      params: the current parameters, host arrays as nested dicts.
      step: the step that the parameters come from.
      folder: where results are stored; created if missing.
      log: called with lines of progress.
    """
    ...
