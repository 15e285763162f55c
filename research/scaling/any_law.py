"""Fitting any law to a table: its inputs from columns, its parameters with intervals, and what to doubt."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import bootstrap, cells, fitted, law_fit
from research.scaling import columns as columns_module
from research.scaling.cells import RowError
from research.scaling.fitting import Options
from research.scaling.laws.base import Law, LawError
from research.scaling.rows import DONE, Columns

DERIVED = {
  'flops': (('params', 'tokens'), lambda n, d: 6 * n * d),
  'tokens': (('params', 'flops'), lambda n, c: c / (6 * n)),
  'tokens_per_param': (('params', 'tokens'), lambda n, d: d / n),
}
DEFAULT = Columns()


@dataclasses.dataclass(frozen=True)
class FittedLaw:
  """A law of any inputs fitted to a table. `columns`: where each input came from."""

  fit: fitted.Fit
  bootstrap: bootstrap.Bootstrap
  columns: dict[str, str]
  excluded: tuple[tuple[str, str], ...] = ()
  level: float = 0.9

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
    lines.append(f'  residuals: {100 * float(np.std(fit.residuals)):.3g}% rms')
    return '\n'.join(lines)


def fit_law(
  rows: Iterable[Mapping],
  law: Law,
  columns: Columns = DEFAULT,
  role: str | None = 'fit',
  options: Options = Options(),  # noqa: B008 (frozen)
) -> FittedLaw:
  """Fits `law` to the rows of a table.

  An input's column is the one that `columns.inputs` names, or the one of its name without case and punctuation;
  FLOPs, tokens and tokens per parameter follow from the others (C = 6 N D) where no column has them.

  Raises:
    LawError: an input has no column. RowError: a cell is no number. NotIdentifiable: the rows do not
    determine it.
  """
  rows = list(rows)
  where = {name: _column(rows, law, columns, name) for name in (*law.inputs, law.output)}
  needs = {column for column in where.values() if isinstance(column, str)}
  needs |= {c for column in where.values() if isinstance(column, dict) for c in column.values()}
  status = columns_module.find(rows, columns, 'status')
  role_column = columns_module.find(rows, columns, 'role')
  kept, excluded = [], []
  for i, row in enumerate(rows, 1):
    why = _why_not(row, needs, status, role_column, role)
    if why:
      excluded.append((f'row {i}', why))
    else:
      kept.append(row)
  if not kept:
    raise RowError(
      f'No row is left to fit {law.name} to: {excluded[0][1] if excluded else "there are none"}.'
    )
  values = {name: _values(kept, column, name, columns) for name, column in where.items()}
  output = values.pop(law.output)
  fit = law_fit.fit(law, values, output, **options.of_the_law())
  kind = options.resample if options.resample in ('residual', 'pairs') else 'residual'
  spread = bootstrap.bootstrap(fit, kind, replicates=options.replicates, seed=options.seed)
  shown = {
    name: column if isinstance(column, str) else ', '.join(column.values())
    for name, column in where.items()
  }
  return FittedLaw(fit, spread, shown, tuple(excluded), options.level)


def _column(rows, law: Law, columns: Columns, name: str) -> str | dict[str, str]:
  """The column of an input, or those from which it follows, quantity -> column."""
  asked = {key.lower(): column for key, column in columns.inputs.items()}
  names = columns_module.column_names(rows)
  if name.lower() in asked:
    return columns_module.resolve(asked[name.lower()], names, name)
  found = columns_module.find(rows, columns, name) if name in columns_module.ALIASES else None
  if found is not None:
    return found
  alike = [other for other in names if columns_module.bare(other) == columns_module.bare(name)]
  if len(alike) == 1:
    return alike[0]
  if name in DERIVED:
    found = {other: columns_module.find(rows, columns, other) for other in DERIVED[name][0]}
    if all(found.values()):
      return found
  raise LawError(
    f'{law.name} is a law of {", ".join(law.inputs)} for {law.output}, and the table has no column '
    f'{name!r}; say '
    f'which it is with --input {name}=COLUMN.{did_you_mean(name, names)}'
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
