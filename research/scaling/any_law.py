"""Fitting any law to a table: its inputs from columns, its parameters with intervals, and what to doubt."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import binomial, bootstrap, cells, fitted, law_fit
from research.scaling import columns as columns_module
from research.scaling.cells import RowError
from research.scaling.laws.base import Law, LawError
from research.scaling.options import Options
from research.scaling.rows import DONE, Columns

DERIVED = {
  'flops': (('params', 'tokens'), lambda n, d: 6 * n * d),
  'tokens': (('params', 'flops'), lambda n, c: c / (6 * n)),
  'tokens_per_param': (('params', 'tokens'), lambda n, d: d / n),
}
DEFAULT = Columns()


@dataclasses.dataclass(frozen=True)
class FittedLaw:
  """A law of any inputs fitted to a table.

  Attributes:
    columns: where each input came from.
    examples: of an accuracy, the median over rows; None if not told.
    not_determined: why the rows may not determine the parameters, where that was to be told and not refused.
  """

  fit: fitted.Fit
  bootstrap: bootstrap.Bootstrap
  columns: dict[str, str]
  excluded: tuple[tuple[str, str], ...] = ()
  level: float = 0.9
  examples: float | None = None
  not_determined: tuple[str, ...] = ()

  def value_at(self, **inputs) -> tuple[float, float, float]:
    """The law's value at one point, and its interval without the scatter of a run."""
    value = float(self.fit.predict(**inputs))
    low, high = self.bootstrap.interval(
      self.fit.law(self.bootstrap.parameters, **inputs), self.level
    )
    return value, float(low), float(high)

  def __str__(self) -> str:
    fit, spread = self.fit, self.bootstrap.intervals(self.level)
    where = ', '.join(f'{name} = {column}' for name, column in self.columns.items())
    lines = [f'{len(fit.observed)} rows, {where}']
    lines += [f'  left out: {run}: {why}' for run, why in self.excluded[:8]]
    if len(self.excluded) > 8:
      lines.append(f'  and {len(self.excluded) - 8} more left out')
    lines.append(
      f'{fit.law.name}: {fit.law.output} = {fit.law.form}   objective {fit.objective:.10g}'
    )
    for name, value in fit.parameters.items():
      low, high = spread[name]
      meaning = fit.law.parameters[name].meaning
      lines.append(f'  {name:8s} {value:<11.5g} [{low:.4g}, {high:.4g}]  {meaning}')
    lines += fitted.show_minima(fit)
    lines += [f'  NOT DETERMINED by these rows: {reason}' for reason in self.not_determined]
    log = fit.problem.residuals == 'log'
    size = float(np.std(fit.residuals))
    lines.append(f'  residuals: {100 * size:.3g}% rms' if log else f'  residuals: {size:.3g} rms')
    if self.bootstrap.kind == 'binomial':
      scatter = binomial.dispersion(fit, self.examples)
      lines.append(
        f'  binomial noise of {self.examples:g} examples; the variance of the rows is {scatter:.2g} times that'
      )
    return '\n'.join(lines)


def fit_law(
  rows: Iterable[Mapping],
  law: Law,
  columns: Columns = DEFAULT,
  role: str | None = 'fit',
  options: Options = Options(),  # noqa: B008 (frozen)
  anchors: Iterable[Mapping[str, float]] = (),
) -> FittedLaw:
  """Fits `law` to the rows of a table, and to `anchors`: made-up points, each {input: value, output: value}.

  An input's column is the one that `columns.inputs` names, or the one of its name without case and punctuation;
  FLOPs, tokens and tokens per parameter follow from the others (C = 6 N D) where no column has them. With
  `options.examples` the output is a share of as many examples (see `binomial`). Where runs have several rows
  the bootstrap draws runs, since rows of one run are not independent.

  Raises:
    LawError: an input has no column. RowError: a cell is no number. NotIdentifiable: the rows do not
    determine it.
  """
  rows = list(rows)
  where = _columns(rows, law, columns, (*law.inputs, law.output))
  examples = options.examples
  if isinstance(examples, str):
    examples = columns_module.resolve(examples, columns_module.column_names(rows), 'examples')
  used, excluded = _rows_that_count(rows, where, columns, role, also=examples)
  if not used:
    raise RowError(
      f'No row is left to fit {law.name} to: {excluded[0][1] if excluded else "there are none"}.'
    )
  values = {name: _values(used, column, name, columns) for name, column in where.items()}
  if isinstance(examples, str):
    examples = _values(used, examples, 'examples', columns)
  runs = _runs(used, columns)
  anchors = list(anchors)
  for anchor in anchors:
    values = _with_anchor(law, values, anchor)
    runs = None if runs is None else np.append(runs, 'an anchor')
    examples = np.append(examples, np.median(examples)) if np.ndim(examples) else examples
  fit, spread = _fit(law, values, examples, runs, options, len(anchors))
  shown = {
    name: column if isinstance(column, str) else ', '.join(column.values())
    for name, column in where.items()
  }
  typical = None if examples is None else float(np.median(examples))
  doubts = () if options.check else tuple(law_fit.not_determined(fit))
  return FittedLaw(fit, spread, shown, tuple(excluded), options.level, typical, doubts)


def _fit(law: Law, values: dict, examples, runs, options: Options, anchors: int):
  """(fit, bootstrap) of read columns, name -> [rows], of which the last `anchors` were made up."""
  values = dict(values)
  output = values.pop(law.output)
  resampling = {'replicates': options.replicates, 'seed': options.seed}
  if examples is not None:
    settings = {name: getattr(options, name) for name in ('starts', 'fixed', 'tied', 'check')}
    fit = binomial.fit(law, values, output, examples, **settings)
    return fit, binomial.resample(fit, examples, **resampling)
  fit = law_fit.fit(law, values, output, **options.of_the_law())
  kind = options.resample
  if kind not in ('residual', 'pairs'):
    repeated = runs is not None and 3 <= len(set(runs)) < len(runs)
    kind = 'cluster' if repeated and kind in (None, 'cluster by run') else 'residual'
  if kind != 'cluster':
    return fit, bootstrap.bootstrap(fit, kind, **resampling)
  return fit, _by_run(fit, runs, anchors, options)


def _by_run(
  fit: fitted.Fit, runs: np.ndarray, anchors: int, options: Options
) -> bootstrap.Bootstrap:
  """A cluster bootstrap by run in which the anchors, the last rows, are in every replicate."""
  rng = np.random.default_rng(options.seed)
  measured = runs[: len(runs) - anchors]
  names = np.unique(measured)
  members = [np.flatnonzero(measured == name) for name in names]
  made_up = np.arange(len(measured), len(runs))
  draws = [
    np.concatenate([*(members[i] for i in rng.integers(len(names), size=len(names))), made_up])
    for _ in range(options.replicates)
  ]
  result = bootstrap.bootstrap(fit, 'pairs', draws=draws)
  freedom = float(max(len(names) - len(fit.problem.free), 1))
  return dataclasses.replace(result, kind='cluster', freedom=freedom)


def _with_anchor(law: Law, values: dict, anchor: Mapping[str, float]) -> dict:
  """The columns with one more row; its every input and output must be given."""
  if set(anchor) != set(values):
    raise LawError(
      f'An anchor of {law.name} gives {", ".join(values)} and nothing else, not {", ".join(anchor)}.'
    )
  return {name: np.append(column, anchor[name]) for name, column in values.items()}


def _columns(rows, law: Law, columns: Columns, names: Iterable[str]) -> dict:
  return {name: find_column(rows, law, columns, name) for name in names}


def _rows_that_count(rows, where: dict, columns: Columns, role, also=None) -> tuple[list, list]:
  """(the rows that a fit takes, [(row, why not)] of the others)."""
  needs = {column for column in where.values() if isinstance(column, str)}
  needs |= {c for column in where.values() if isinstance(column, dict) for c in column.values()}
  needs |= {also} if isinstance(also, str) else set()
  status = columns_module.find(rows, columns, 'status')
  role_column = columns_module.find(rows, columns, 'role')
  used, excluded = [], []
  for i, row in enumerate(rows, 1):
    why = _why_not(row, needs, status, role_column, role)
    if why:
      excluded.append((f'row {i}', why))
    else:
      used.append(row)
  return used, excluded


def _runs(rows, columns: Columns) -> np.ndarray | None:
  column = columns_module.find(rows, columns, 'run')
  return None if column is None else np.array([str(row.get(column)) for row in rows])


def read(
  rows, names: Iterable[str], law: Law, columns: Columns, role: str | None
) -> dict[str, np.ndarray]:
  """Columns of quantities, name -> [rows], of the rows that have them all; `law` is for messages.

  Raises:
    LawError: a quantity has no column.
  """
  where = _columns(rows, law, columns, names)
  used, _ = _rows_that_count(rows, where, columns, role)
  return {name: _values(used, column, name, columns) for name, column in where.items()}


def find_column(rows, law: Law, columns: Columns, name: str) -> str | dict[str, str]:
  """The column of an input, or those from which it follows, quantity -> column."""
  named = {key.lower(): column for key, column in columns.inputs.items()}
  names = columns_module.column_names(rows)
  if name.lower() in named:
    return columns_module.resolve(named[name.lower()], names, name)
  found = columns_module.find(rows, columns, name) if name in columns_module.ALIASES else None
  if found is not None:
    return found
  matches = [other for other in names if columns_module.bare(other) == columns_module.bare(name)]
  if len(matches) == 1:
    return matches[0]
  if name in DERIVED:
    found = {other: columns_module.find(rows, columns, other) for other in DERIVED[name][0]}
    if all(found.values()):
      return found
  raise LawError(
    f'{law.name} is a law of {", ".join(law.inputs)} for {law.output}, and the table has no column '
    f'{name!r}; say which it is with --input {name}=COLUMN.{did_you_mean(name, names)}'
  )


def _why_not(row, needs, status, role_column, role) -> str | None:
  state = str(row.get(status, '') or '').strip().lower() if status else ''
  if state not in DONE:
    return f'its status is {state!r}'
  its = str(row.get(role_column, '') or '').strip() if role_column else ''
  if role is not None and its and its != role:
    return f'its role is {its!r}'
  for column in sorted(needs):
    cell = row.get(column)
    if cells.is_blank(cell) or (cells.is_number(cell) and not math.isfinite(cells.number(cell))):
      return f'its {column} is {"blank" if cells.is_blank(cell) else cell}'
  return None


def _values(rows, column, name: str, columns: Columns) -> np.ndarray:
  if isinstance(column, dict):
    parts = [_values(rows, part, quantity, columns) for quantity, part in column.items()]
    return DERIVED[name][1](*parts)
  values = []
  for i, row in enumerate(rows, 1):
    try:
      values.append(cells.number(row[column]))
    except ValueError as error:
      raise RowError(f'row {i}: {column} is {error}.') from None
  values = np.array(values)
  if name in ('params', 'tokens', 'flops'):
    return values * columns_module.scale_of(column, name, columns)
  if name == 'loss' and (unit := columns_module.loss_unit(column, columns)) != 'nats':
    return np.log(values) if unit == 'perplexity' else values * math.log(2)
  return values
