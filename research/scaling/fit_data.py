"""Rows as the solver wants them: checked, with their logarithms and their typical sizes."""

from collections.abc import Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling.laws.base import Law, LawError


def make_data(law: Law, inputs: Mapping, loss) -> tuple[dict, np.ndarray]:
  """Rows as the solver wants them, and the observed output [rows].

  The first holds `x` (every input and its logarithm), `center` (ln of the typical size of every input and of
  the output, by which the fit divides units out) and `ones` [rows, 1].

  Raises:
    LawError: an input lacks, or a value is none that the law can take.
  """
  y = np.atleast_1d(np.asarray(loss, np.float64))
  x = {}
  for name in law.inputs:
    if name not in inputs:
      raise LawError(f'{law.name} needs the input {name!r}.{did_you_mean(name, inputs)}')
    x[name] = np.broadcast_to(np.asarray(inputs[name], np.float64), y.shape)
  for name, values in {**x, law.output: y}.items():
    bad, must = ~(np.isfinite(values) & (values > 0)), 'positive'
    if name in law.plain:
      bad, must = ~np.isfinite(values), 'finite'
    elif name in law.zeros:
      bad, must = ~(np.isfinite(values) & (values >= 0)), 'zero or positive'
    if bad.any():
      row = int(np.flatnonzero(bad)[0])
      raise LawError(f'{law.name}: {name} is {values[row]} in row {row}; it must be {must}.')
  logs = law.logarithms(x)
  center = {name: _mean_log(x[name]) for name in law.inputs if name not in law.plain}
  # An output of any sign has no geometric mean; its root mean square is as good a unit.
  signed = law.output in law.plain
  center['output'] = float(np.log(np.sqrt(np.mean(y**2)) or 1.0)) if signed else _mean_log(y)
  return {'x': {**x, **logs}, 'center': center, 'ones': np.ones((len(y), 1))}, y


def _mean_log(values: np.ndarray) -> float:
  """The mean logarithm of the values that are not zero; 0 where all are."""
  positive = values[values > 0]
  return float(np.log(positive).mean()) if len(positive) else 0.0
