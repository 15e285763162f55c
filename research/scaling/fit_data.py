"""Prepares rows for the solver: checks them, and adds their logarithms and their typical sizes."""

from collections.abc import Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling.laws.base import Law, LawError


def make_data(law: Law, inputs: Mapping, loss) -> tuple[dict, np.ndarray]:
  """(the rows for the solver, the observed output [rows]).

  The rows are a dict of `x`, every input and its logarithm by name, [rows] each; `center`, ln of the typical
  size of every input and of the output, by which the fit divides units out; and `ones` [rows, 1].

  Raises:
    LawError: an input is missing, or a value is impossible for the law.
  """
  y = np.atleast_1d(np.asarray(loss, np.float64))
  x = {}
  for name in law.inputs:
    if name not in inputs:
      raise LawError(f'{law.name} needs the input {name!r}.{did_you_mean(name, inputs)}')
    x[name] = np.broadcast_to(np.asarray(inputs[name], np.float64), y.shape)
  for name, values in {**x, law.output: y}.items():
    good = np.isfinite(values)
    if name in law.plain:
      condition = 'finite'
    elif name in law.zeros:
      good &= values >= 0
      condition = 'zero or positive'
    else:
      good &= values > 0
      condition = 'positive'
    if not good.all():
      row = int(np.flatnonzero(~good)[0])
      raise LawError(f'{law.name}: {name} is {values[row]} in row {row}; it must be {condition}.')
  logs = law.logarithms(x)
  center = {name: _mean_log(x[name]) for name in law.inputs if name not in law.plain}
  # An output of any sign has no geometric mean; its root mean square is as good a unit.
  signed = law.output in law.plain
  center['output'] = float(np.log(np.sqrt(np.mean(y**2)) or 1.0)) if signed else _mean_log(y)
  return {'x': {**x, **logs}, 'center': center, 'ones': np.ones((len(y), 1))}, y


def _mean_log(values: np.ndarray) -> float:
  """The mean logarithm of the positive values; 0 where there are none."""
  positive = values[values > 0]
  return float(np.log(positive).mean()) if len(positive) else 0.0
