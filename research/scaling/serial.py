"""Writes an analysis to JSON, and reads it back."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable

import numpy as np

from research.scaling import (
  allocation,
  any_law,
  bootstrap,
  comparison,
  cost,
  fitted,
  forecasting,
  laws,
  objective,
  rollout,
  rows,
  sampling_fit,
  two_step,
)
from research.scaling.analysis import Analysis
from research.scaling.laws.base import Law, LawError

FORMAT = 1  # raised when an older file can no longer be read


def plain(value):
  """Dataclasses, arrays and numpy scalars as JSON values. NaN and infinities, which JSON lacks, are strings."""
  if isinstance(value, Law):
    return value.name
  if dataclasses.is_dataclass(value):
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, (np.floating, float)):
    return float(value) if math.isfinite(value) else str(float(value))
  if isinstance(value, np.integer):
    return int(value)
  return value


def array(value) -> np.ndarray:
  """The inverse of `plain` for a (nested) list of numbers."""
  return np.array(value, np.float64)


def save(analysis: Analysis, path) -> None:
  """Writes an analysis to a JSON file. `load` reads it back, unless it is of a law alone."""
  pathlib.Path(path).write_text(to_json(analysis) + '\n')


def load(path, extra_laws: Iterable[Law] = ()) -> Analysis:
  """Reads the analysis that `save` wrote.

  Args:
    extra_laws: instances of laws that this package does not have.

  Raises:
    LawError: the file is of another format, or was fitted with an unknown law.
  """
  return from_json(pathlib.Path(path).read_text(), extra_laws)


def to_json(analysis: Analysis | any_law.FittedLaw) -> str:
  """The analysis as JSON text. Of a law alone it has the parameters, intervals and minima, and not the rows."""
  if isinstance(analysis, any_law.FittedLaw):
    return json.dumps(_of_a_law(analysis), indent=1)
  if isinstance(analysis, two_step.TwoSteps):
    steps = {name: _of_a_law(getattr(analysis, name)) for name in ('first', 'second')}
    return json.dumps({**steps, 'emergence': plain(analysis.emergence)}, indent=1)
  if isinstance(analysis, sampling_fit.FittedCoverage):
    intervals = {name: analysis.interval(drawn) for name, drawn in analysis.samples.items()}
    values = {**plain(analysis), 'samples': None, 'intervals': plain(intervals)}
    return json.dumps(values, indent=1)
  return json.dumps(analysis_to_dict(analysis), indent=1)


def _of_a_law(fitted_law: any_law.FittedLaw) -> dict:
  """A law alone as JSON values."""
  fit = fitted_law.fit
  return plain({
    'law': fit.law, 'form': fit.law.form, 'columns': fitted_law.columns, 'rows': len(fit.observed),
    'parameters': fit.parameters, 'intervals': fitted_law.bootstrap.intervals(fitted_law.level),
    'level': fitted_law.level, 'objective': fit.objective, 'minima': fit.minima,
    'excluded': fitted_law.excluded,
  })  # fmt: skip


def from_json(text: str, extra_laws: Iterable[Law] = ()) -> Analysis:
  """The inverse of `to_json`."""
  return analysis_from_dict(json.loads(text), extra_laws)


def analysis_to_dict(a: Analysis) -> dict:
  """The analysis as JSON values, with the results that take long to compute again."""
  return {'format': FORMAT, **plain(a), 'trials': plain(a.trials), 'compared': plain(a.compared)}


def analysis_from_dict(d: dict, extra_laws: Iterable[Law] = ()) -> Analysis:
  """The inverse of `analysis_to_dict`."""
  if d.get('format') != FORMAT:
    raise LawError(
      f'This is not a saved analysis of format {FORMAT} (its format is {d.get("format")!r}).'
    )
  known = {law.name: law for law in (*laws.standard(), *extra_laws)}
  analysis = Analysis(
    rows=_observations(d['rows']),
    cost=cost.Cost(**d['cost']),
    approach1=_allocation(d['approach1']),
    approach2=_allocation(d['approach2']),
    approach3=_fit(d['approach3'], known),
    bootstrap=_bootstrap(d['bootstrap']),
    refusals=d['refusals'],
    notes=tuple(d['notes']),
    conventions=tuple(d['conventions']),
    level=d['level'],
    rule=d.get('rule', forecasting.DEFAULT),
    doubts=tuple(d.get('doubts', ())),
  )
  # `trials` and `compared` are cached properties, which keep their values in the instance's dictionary.
  if 'trials' in d:
    vars(analysis)['trials'] = tuple(rollout.RollOut(*trial) for trial in d['trials'])
  if 'compared' in d:
    vars(analysis)['compared'] = tuple(comparison.Compared(*line) for line in d['compared'])
  return analysis


def _observations(d) -> rows.Observations:
  arrays = {k: array(d[k]) for k in rows.ARRAYS if k != 'run'}
  return rows.Observations(
    np.array(d['run']),
    **arrays,
    excluded=tuple((run, why) for run, why in d['excluded']),
    columns=d['columns'],
    extra={name: array(values) for name, values in d.get('extra', {}).items()},
    labels={name: np.array(values) for name, values in d.get('labels', {}).items()},
    remarks=tuple(d.get('remarks', ())),
  )


def _allocation(d) -> allocation.Allocation | None:
  if d is None:
    return None
  lines = {k: allocation.PowerLaw(*map(float, d[k].values())) for k in ('params', 'tokens', 'loss')}
  profiles = []
  for p in d['profiles']:
    arrays = {k: array(p[k]) for k in ('params', 'tokens', 'loss')}
    numbers = {k: float(p[k]) for k in ('flops', 'params_opt', 'tokens_opt', 'loss_opt')}
    profiles.append(
      allocation.Profile(**{**p, **arrays, **numbers, 'warnings': tuple(p['warnings'])})
    )
  rest = {'profiles': tuple(profiles), 'samples': array(d['samples'])}
  return allocation.Allocation(**{**d, **lines, **rest})


def _fit(d, known) -> fitted.Fit | None:
  if d is None:
    return None
  p = d['problem']
  if p['law'] not in known:
    raise LawError(
      f'The analysis was fitted with {p["law"]}; pass an instance of it in extra_laws.'
    )
  # JSON has lists and no tuples; a Problem must be hashable.
  fixed = tuple((name, value) for name, value in p['fixed'])
  tied = tuple((name, other) for name, other in p['tied'])
  problem = objective.Problem(known[p['law']], p['loss'], p['residuals'], fixed, tied)
  data = d['data']
  data = {
    'x': {k: array(v) for k, v in data['x'].items()},
    'center': data['center'],
    'ones': array(data['ones']),
  }
  names = ('z', 'covariance', 'correlations', 'observed', 'weights')
  arrays = {k: array(d[k]) for k in names}
  minima = tuple(fitted.Minimum(**m) for m in d['minima'])
  return fitted.Fit(**{**d, 'problem': problem, 'minima': minima, 'data': data, **arrays})


def _bootstrap(d) -> bootstrap.Bootstrap | None:
  if d is None:
    return None
  values = {k: array(v) for k, v in d['parameters'].items()}
  arrays = {k: array(d[k]) for k in ('objective', 'spread')}
  return bootstrap.Bootstrap(d['kind'], values, **arrays, freedom=float(d.get('freedom', 'inf')))
