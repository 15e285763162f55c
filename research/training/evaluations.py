"""What a run does with evaluations of its own: the interface that `research.evaluation` fulfils.

Training knows no task and no tokenizer. A gin file binds whatever evaluates:

    Run.evaluations = (@suite.Suite(),)
"""

import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Evaluation(Protocol):
  """Looks at what a run can do.

  Attributes:
    name: of its folder; differs from that of every other evaluation of the run.
    labels: of what it measures; its columns are eval/<label>/<metric>.
    during: whether it is done at each evaluation of the run, and not at its end alone.
  """

  name: str
  labels: tuple[str, ...]
  during: bool

  def columns(
    self, run, params: dict, step: int, folder: pathlib.Path, log: Callable[[str], None]
  ) -> dict[str, float | int | str]:
    """What it finds, by column. It does nothing twice that it left in the folder.

    Args:
      run: the `training.run.Run`.
      params: of now, host arrays as nested dicts.
      folder: to keep results in; need not exist.
      log: takes lines for a person.
    """
    ...
