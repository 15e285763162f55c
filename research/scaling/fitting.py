"""Fits everything to a table in one call: rows in, an `Analysis` out."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from scipy import stats

from research.scaling import (
  allocation,
  approaches,
  bootstrap,
  diagnostics,
  doubts,
  envelope,
  fitted,
  forecasting,
  groups,
  held,
  law_fit,
  laws,
)
from research.scaling import rows as table
from research.scaling.analysis import Analysis
from research.scaling.cost import fit_cost
from research.scaling.forecast import NoForecast
from research.scaling.laws.base import Law, LawError
from research.scaling.options import CHINCHILLA, Options

_COLUMNS = table.Columns()


def fit_results(
  rows,
  *,
  columns: table.Columns = _COLUMNS,
  law: Law = CHINCHILLA,
  profile: str = 'parabola',
  noise: float | None = None,
  curves: Mapping | None = None,
  role: str | None = 'fit',
  drop_highest: int = 0,
  robust: str | None = None,
  delta: float = 1e-3,
  tau: float = 0.5,
  starts='grid',
  residuals: str | None = None,
  fixed: Mapping[str, float] | None = None,
  tied: Mapping[str, str] | None = None,
  resample: str | None = None,
  replicates: int = 1000,
  level: float = 0.9,
  seed: int = 0,
  rule: str | None = None,
  conventions: bool = True,
  checkpoints: bool = False,
  strict: bool = False,
) -> Analysis:
  """Approaches 1 (where there are `curves`), 2 and 3, with bootstrap intervals.

  Args:
    rows: a path (see `tables.read`), a list of dicts, or Observations.
    columns: the columns of N, D, C and the loss, and their units.
    law: what approach 3 fits. Where the rows do not determine it, TiedChinchilla takes its place, unless that
      fits significantly worse or cannot hold what is fixed; `Analysis.refusals` has the reasons.
    profile, noise: approach 2's interpolation and noise between seeds; see `approaches.isoflop`.
    curves: the training curve of each run, [(tokens, loss), ...], for approach 1.
    role: fit only rows of this role, or of none; None for all.
    drop_highest: leave out so many of the highest losses (Besiroglu et al. 2024 drop 5).
    robust, delta, tau, starts, residuals, fixed, tied: see `law_fit.fit`. A fixed E is also the floor of
      approach 2.
    resample: what a bootstrap draws, 'residual', 'pairs', 'cluster by run' or 'cluster by budget'. None for
      'cluster by run' where runs have several rows, and 'residual' elsewhere.
    replicates, seed: of the bootstrap. level: of every interval, such as 0.9.
    rule: what makes a forecast, one of `forecasting.RULES`. None for learned priors, or for the mean of
      approaches where the law or a parameter was chosen.
    conventions: also fit every other count of N and C that the rows have, for the table of conventions.
    checkpoints: take every row of a run, and not only its last.
    strict: raise RowError for a doubt about the table.

  Raises:
    RowError: the table cannot be read, or with `strict` is doubtful.
    NoForecast: neither approach 2 nor approach 3 is possible. LawError: an option is wrong.
  """
  if isinstance(rows, (str, pathlib.Path)):
    rows = table.read_table(rows)
  if not isinstance(rows, table.Observations):
    rows = list(rows)
  options = Options(
    law, profile, noise, drop_highest, robust, delta, tau, starts, residuals, fixed, tied, resample,
    replicates, level, seed, rule,
  )  # fmt: skip
  observations, sentences = _observe(rows, columns, role, checkpoints)
  if strict and sentences:
    raise table.RowError(f'--strict: {sentences[0]}')
  result = analyse(observations, options, curves)
  result = dataclasses.replace(result, doubts=(*sentences, *result.doubts))
  if strict and result.doubts:
    raise table.RowError(f'--strict: {result.doubts[0]}')
  if not conventions or isinstance(rows, table.Observations):
    return result
  # The table of conventions shows exponents without their intervals.
  quick = dataclasses.replace(options, replicates=50)

  def fit(rows, columns):
    observations, _ = _observe(rows, columns, role, checkpoints)
    return analyse(observations, quick)

  return dataclasses.replace(result, conventions=diagnostics.conventions(rows, columns, fit))


def _observe(rows, columns, role, checkpoints) -> tuple[table.Observations, list[str]]:
  """(the rows that count, the doubts about them)."""
  if isinstance(rows, table.Observations):
    return rows, []
  observations = table.observe(rows, columns, role)
  doubts.check_units(observations)
  sentences = []
  if not checkpoints:
    observations, sentence = doubts.last_of_each_run(observations)
    sentences += [sentence] if sentence else []
  return observations, [*sentences, *doubts.about(observations)]


def analyse(rows: table.Observations, options: Options, curves: Mapping | None = None) -> Analysis:
  """`fit_results` for one count of N and C."""
  if options.replicates < 1:
    raise LawError(
      f'{options.replicates} bootstrap replicates give no interval; ask for 1 or more.'
    )
  rows = _without_highest(rows, options.drop_highest)
  _check_law(options.law, rows)
  held.check(options.law, options.fixed, options.tied, rows.loss)
  cost = fit_cost(rows.params, rows.tokens, rows.flops)
  refusals: dict[str, str] = {}
  rule = options.rule or _default_rule(options)
  forecasting.check(rule, holds=(*(options.fixed or ()), *(options.tied or ())))
  envelope_of_curves = _approach1(curves, rows, cost, refusals)
  isoflop = _approach2(rows, cost, options, refusals)
  fit = _approach3(rows, options, refusals)
  about_groups = _about_groups(rows, fit)
  if fit is None and isoflop is None:
    raise NoForecast(' '.join(dict.fromkeys([*about_groups, *refusals.values()])))
  spread = None
  if fit is not None:
    kind, clusters = _resampling(options.resample, rows)
    spread = bootstrap.bootstrap(
      fit, kind, groups=clusters, replicates=options.replicates, seed=options.seed
    )
  result = Analysis(
    rows=rows,
    cost=cost,
    approach1=envelope_of_curves,
    approach2=isoflop,
    approach3=fit,
    bootstrap=spread,
    refusals=refusals,
    level=options.level,
    rule=rule,
    doubts=about_groups,
  )
  notes = diagnostics.notes(result)
  if isoflop is not None and rule != 'law' and (sentence := held.unheard(options.fixed)):
    notes.insert(0, sentence)
  return dataclasses.replace(result, notes=tuple(notes))


def _default_rule(options: Options) -> str:
  """The rule where none was named. Learned priors have a law of their own, which ignores a chosen one."""
  chosen = options.law != CHINCHILLA or options.fixed or options.tied
  return 'mean of approaches' if chosen else forecasting.DEFAULT


def _about_groups(rows, fit: fitted.Fit | None) -> tuple[str, ...]:
  """Sentences on whether the table holds several studies, by its losses and by the residuals of the law.

  A column that names the studies says most, a jump or a gap without a name less: the first of them counts.
  """
  sentence = groups.two_groups(rows)
  if fit is not None and (studies := groups.several_studies(rows, fit)):
    return tuple(studies)
  if fit is not None:
    sentence = sentence or groups.step_in(rows, fit)
  return (sentence,) if sentence else ()


def _check_law(law: Law, rows: table.Observations) -> None:
  """Raises LawError unless N and D are among the law's inputs, and all its inputs among those of the rows."""
  if not {'params', 'tokens'} <= set(law.inputs) <= set(rows.inputs):
    raise LawError(
      f'{law.name} is a law of {", ".join(law.inputs)}; approach 3 fits laws of params and tokens '
      '(such as Chinchilla). For this one, call scaling.fit in Python with an array of each input.'
    )


def _without_highest(rows: table.Observations, count: int) -> table.Observations:
  """The rows without the `count` highest losses, which join the rows left out."""
  if count <= 0:
    return rows
  highest = np.argsort(rows.loss, kind='stable')[-count:]
  keep = np.setdiff1d(np.arange(len(rows)), highest)
  dropped = tuple((str(rows.run[i]), f'one of the {count} highest losses') for i in highest)
  return dataclasses.replace(rows.take(keep), excluded=rows.excluded + dropped)


def _approach1(curves, rows, cost, refusals) -> allocation.Allocation | None:
  """The envelope; None without curves, or where it is refused, with the reason in `refusals`."""
  if not curves:
    return None
  params = {str(run): float(n) for run, n in zip(rows.run, rows.params, strict=True)}
  try:
    # A run that was left out of the fit has a curve and no N.
    curves = {run: curve for run, curve in curves.items() if run in params}
    return envelope.envelope(curves, params, cost)
  except allocation.NoAllocation as error:
    refusals['approach 1'] = str(error)
    return None


def _approach2(rows, cost, options: Options, refusals) -> allocation.Allocation | None:
  """The isoFLOP minima; None where they are refused, with the reason in `refusals`."""
  try:
    return approaches.isoflop(
      rows, cost, method=options.profile, noise=options.noise,
      floor=float((options.fixed or {}).get('E', 0.0)), replicates=options.replicates,
      seed=options.seed,
    )  # fmt: skip
  except allocation.NoAllocation as error:
    refusals['approach 2'] = str(error)
    return None


def _approach3(rows, options: Options, refusals) -> fitted.Fit | None:
  """The fitted law, or TiedChinchilla in its place; None where neither is possible.

  TiedChinchilla comes in where the rows do not determine the law and it does not fit significantly worse. The
  reasons go into `refusals`.
  """
  law = options.law
  tied = laws.TiedChinchilla()
  try:
    return law_fit.fit(law, rows.inputs, rows.loss, **options.of_the_law())
  except fitted.NotIdentifiable as error:
    refusals['approach 3'] = str(error)
  if law == tied:
    return None
  # Explicit starts have the names of the other law.
  grid = options.starts if isinstance(options.starts, str) else 'grid'
  try:
    fixed, ties = held.in_place_of(law, options.fixed, options.tied)
    arguments = options.of_the_law() | {'fixed': fixed, 'tied': ties, 'starts': grid}
    fit = law_fit.fit(tied, rows.inputs, rows.loss, **arguments)
  except (fitted.NotIdentifiable, LawError) as error:
    refusals['approach 3, tied'] = str(error)
    return None
  if (worse := _how_much_worse(fit, rows, options)) is not None:
    refusals['approach 3, tied'] = worse
    return None
  return fit


def _how_much_worse(fit: fitted.Fit, rows, options: Options) -> str | None:
  """A sentence where the tied law fits significantly worse than the law in whose place it comes, else None."""
  try:
    arguments = options.of_the_law() | {'check': False}
    free = law_fit.fit(options.law, rows.inputs, rows.loss, **arguments)
  except fitted.NotIdentifiable:  # fewer rows than parameters
    return None
  spare = len(free.problem.free) - len(fit.problem.free)
  # An objective of zero fits exactly: there is no scatter to test against.
  if spare <= 0 or free.objective <= 0:
    return None
  ratio = fit.objective / free.objective
  # The likelihood ratio test for normal errors.
  if len(rows) * math.log(ratio) < stats.chi2.ppf(0.95, spare):
    return None
  return (
    f'TiedChinchilla fits significantly worse than {options.law.name} (its objective is '
    f'{ratio:.3g} times as large), so it does not replace it.'
  )


def _resampling(resample: str | None, rows) -> tuple[str, np.ndarray | None]:
  clusters = {'cluster by run': rows.run, 'cluster by budget': rows.budget}
  if resample is None:
    # The rows of one run have errors in common. Fewer than three runs cannot be redrawn, and where most runs
    # have one row there is little in common.
    runs = len(np.unique(rows.run))
    clustered = 'run' in rows.columns and 3 <= runs <= 0.7 * len(rows)
    resample = 'cluster by run' if clustered else 'residual'
  if resample in clusters:
    return 'cluster', clusters[resample]
  if resample not in ('residual', 'pairs'):
    raise LawError(f'resample={resample!r} is none of residual, pairs, {", ".join(clusters)}.')
  return resample, None
