"""Fits a law of any inputs to a table: inputs from columns, parameters with intervals, and doubts."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import binomial, bootstrap, cells, fitted, held, law_fit
from research.scaling import columns as columns_module
from research.scaling.cells import RowError
from research.scaling.laws.base import Law, LawError
from research.scaling.options import Options
from research.scaling.rows import Columns, why_not

# Quantities that follow from two others where the table has no column of them; see `_derived`.
DERIVED = {
  'flops': ('params', 'tokens'),
  'tokens': ('params', 'flops'),
  'tokens_per_param': ('params', 'tokens'),
}
DEFAULT = Columns()


@dataclasses.dataclass(frozen=True)
class FittedLaw:
  """A law of any inputs, fitted to a table.

  Attributes:
    columns: the column of each input and of the output; several names where it follows from these.
    excluded: (row, why) of the rows left out.
    level: of every interval.
    examples: how many examples an accuracy is measured on, the median over rows; None if unknown.
    not_determined: why the rows may not determine the parameters, where a fit without check went on.
  """

  fit: fitted.Fit
  bootstrap: bootstrap.Bootstrap
  columns: dict[str, str]
  excluded: tuple[tuple[str, str], ...] = ()
  level: float = 0.9
  examples: float | None = None
  not_determined: tuple[str, ...] = ()

  def value_at(self, **inputs) -> tuple[float, float, float]:
    """(value, low, high) of the law at one point; the interval is without the scatter of a run."""
    value = float(self.fit.predict(**inputs))
    low, high = self.bootstrap.interval(
      self.fit.law(self.bootstrap.parameters, **inputs), self.level
    )
    return value, float(low), float(high)

  def __str__(self) -> str:
    fit = self.fit
    spread = self.bootstrap.intervals(self.level)
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
  """Fits `law` to the rows of a table.

  The column of an input is the one that `columns.inputs` names, or the one with its name, without case and
  punctuation. FLOPs, tokens and tokens per parameter follow from the others (C = 6 N D) where they have no
  column. Where runs have several rows the bootstrap draws runs, since rows of one run are not independent.

  Args:
    rows: column -> cell.
    role: fit only rows of this role, or of none; None for all.
    options: of the fit. With `options.examples` the output is a share of so many examples; see `binomial`.
    anchors: points that no run measured, {input: value, output: value} each, to fit beside the rows.

  Raises:
    LawError: an input has no column. RowError: a cell is not a number, or no row remains.
    NotIdentifiable: the rows do not determine the parameters.
  """
  rows = list(rows)
  where = _columns(rows, law, columns, (*law.inputs, law.output))
  examples = options.examples
  if isinstance(examples, str):
    examples = columns_module.resolve(examples, columns_module.column_names(rows), 'examples')
  used, excluded = _rows_that_count(rows, where, columns, role, also=examples)
  if not used:
    raise RowError(
      f'No row remains to fit {law.name} to: {excluded[0][1] if excluded else "there are none"}.'
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
  held.check(law, options.fixed, options.tied, values[law.output])
  fit, spread = _fit(law, values, examples, runs, options, len(anchors))
  shown = {
    name: column if isinstance(column, str) else ', '.join(column.values())
    for name, column in where.items()
  }
  typical = None if examples is None else float(np.median(examples))
  doubts = () if options.check else tuple(law_fit.not_determined(fit))
  return FittedLaw(fit, spread, shown, tuple(excluded), options.level, typical, doubts)


def _fit(law: Law, values: dict, examples, runs, options: Options, anchors: int):
  """(fit, bootstrap) of `values`, name -> [rows], whose last `anchors` rows are anchors."""
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
  """A cluster bootstrap by run. Anchors, the last rows, are not data, so that every replicate has them."""
  rng = np.random.default_rng(options.seed)
  measured = runs[: len(runs) - anchors]
  names = np.unique(measured)
  members = [np.flatnonzero(measured == name) for name in names]
  anchor_rows = np.arange(len(measured), len(runs))
  draws = []
  for _ in range(options.replicates):
    drawn = rng.integers(len(names), size=len(names))
    draws.append(np.concatenate([*(members[i] for i in drawn), anchor_rows]))
  result = bootstrap.bootstrap(fit, 'pairs', draws=draws)
  freedom = float(max(len(names) - len(fit.problem.free), 1))
  return dataclasses.replace(result, kind='cluster', freedom=freedom)


def _with_anchor(law: Law, values: dict, anchor: Mapping[str, float]) -> dict:
  """The values with one more row.

  Raises:
    LawError: the anchor lacks an input or the output, or has another one.
  """
  if set(anchor) != set(values):
    raise LawError(
      f'An anchor of {law.name} needs exactly {", ".join(values)}, not {", ".join(anchor)}.'
    )
  return {name: np.append(column, anchor[name]) for name, column in values.items()}


def _columns(rows, law: Law, columns: Columns, names: Iterable[str]) -> dict:
  return {name: find_column(rows, law, columns, name) for name in names}


def _rows_that_count(rows, where: dict, columns: Columns, role, also=None) -> tuple[list, list]:
  """(the rows to fit, [(row, why not)] of the others).

  Args:
    where: the columns of the law's quantities, as `find_column` gives them.
    also: another column that must not be blank.
  """
  needs = {column for column in where.values() if isinstance(column, str)}
  needs |= {c for column in where.values() if isinstance(column, dict) for c in column.values()}
  needs |= {also} if isinstance(also, str) else set()
  column_of = {name: columns_module.find(rows, columns, name) for name in ('status', 'role')}
  used = []
  excluded = []
  for i, row in enumerate(rows, 1):
    why = why_not(row, column_of, role) or _blank(row, needs)
    if why:
      excluded.append((f'row {i}', why))
    else:
      used.append(row)
  return used, excluded


def _runs(rows, columns: Columns) -> np.ndarray | None:
  """The name of the run of each row; None where no column has it."""
  column = columns_module.find(rows, columns, 'run')
  return None if column is None else np.array([str(row.get(column)) for row in rows])


def read(
  rows, names: Iterable[str], law: Law, columns: Columns, role: str | None
) -> dict[str, np.ndarray]:
  """Quantities as arrays, name -> [rows], over the rows that have them all.

  Args:
    law: for messages.

  Raises:
    LawError: a quantity has no column. RowError: a cell is not a number.
  """
  where = _columns(rows, law, columns, names)
  used, _ = _rows_that_count(rows, where, columns, role)
  return {name: _values(used, column, name, columns) for name, column in where.items()}


def find_column(rows, law: Law, columns: Columns, name: str) -> str | dict[str, str]:
  """The column of an input, or where it follows from others those of them, quantity -> column.

  Raises:
    LawError: there is no such column.
  """
  named = {key.lower(): column for key, column in columns.inputs.items()}
  names = columns_module.column_names(rows)
  if name.lower() in named:
    return columns_module.resolve(named[name.lower()], names, name)
  if name in columns_module.ALIASES and (column := columns_module.find(rows, columns, name)):
    return column
  matches = [other for other in names if columns_module.bare(other) == columns_module.bare(name)]
  if len(matches) == 1:
    return matches[0]
  if name in DERIVED:
    sources = {other: columns_module.find(rows, columns, other) for other in DERIVED[name]}
    if all(sources.values()):
      return sources
  raise LawError(
    f'{law.name} is a law of {", ".join(law.inputs)} for {law.output}, and the table has no column '
    f'{name!r}; say which it is with --input {name}=COLUMN.{did_you_mean(name, names)}'
  )


def _blank(row, needs: set[str]) -> str | None:
  """Which of the columns that must have a finite number has none in this row; None if all have one."""
  for column in sorted(needs):
    cell = row.get(column)
    if cells.is_blank(cell) or (cells.is_number(cell) and not math.isfinite(cells.number(cell))):
      return f'its {column} is {"blank" if cells.is_blank(cell) else cell}'
  return None


def _values(rows, column, name: str, columns: Columns) -> np.ndarray:
  """A quantity of the rows [rows] in its unit: N and D in counts, C in FLOPs, a loss in nats."""
  if isinstance(column, dict):
    parts = [_values(rows, part, quantity, columns) for quantity, part in column.items()]
    return _derived(name, *parts)
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


def _derived(name: str, params: np.ndarray, other: np.ndarray) -> np.ndarray:
  """The quantity `name` of those in `DERIVED`, with C = 6 N D."""
  if name == 'flops':
    return 6 * params * other
  if name == 'tokens':
    return other / (6 * params)
  return other / params
