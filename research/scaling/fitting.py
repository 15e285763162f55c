"""The whole fit in one call: rows in, an `Analysis` out."""

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
  law_fit,
  laws,
)
from research.scaling import rows as table
from research.scaling.analysis import Analysis
from research.scaling.cost import fit_cost
from research.scaling.forecast import NoForecast
from research.scaling.laws.base import Law, LawError

_COLUMNS, _CHINCHILLA = table.Columns(), laws.Chinchilla()


@dataclasses.dataclass(frozen=True)
class Options:
  """How rows are fitted; the arguments of `fit_results` say what each means."""

  law: Law = _CHINCHILLA
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
  # Of an output that is a share, such as an accuracy: how many examples, as a number or the name of a column.
  examples: float | str | None = None
  # False: parameters that the rows do not determine are told and not refused, as a published fit may want.
  check: bool = True

  def of_the_law(self) -> dict:
    """The arguments of `law_fit.fit`."""
    names = ('robust', 'delta', 'tau', 'starts', 'residuals', 'fixed', 'tied', 'check')
    return {name: getattr(self, name) for name in names}


def fit_results(
  rows,
  *,
  columns: table.Columns = _COLUMNS,
  law: Law = _CHINCHILLA,
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
  """Approaches 1 (given `curves`), 2 and 3 with bootstrap intervals.

  Args:
    rows: a path (see tables.read), a list of dicts, or Observations.
    columns: which columns hold N, D, C and the loss, and their units; see rows.Columns.
    law: what approach 3 fits; where it is not identifiable its reasons are kept, and TiedChinchilla takes its
      place unless it fits significantly worse.
    profile, noise: approach 2's interpolation and seed noise; see approaches.isoflop.
    curves: run -> [(tokens, loss), ...] for approach 1.
    drop_highest: leave out this many of the highest losses (Besiroglu et al. 2024 drop 5).
    robust, delta, tau, starts, residuals, fixed, tied: see law_fit.fit. A fixed E is
      approach 2's asymptote too.
    resample: 'residual', 'pairs', 'cluster by run' or 'cluster by budget'; None: 'cluster by run' where runs
      have several rows, and else 'residual'.
    rule: what a forecast is made by; see forecasting.RULES. None: learned priors, or where a law was chosen or
      parameters are held the mean of approaches, which has them.
    conventions: also fit every count of N and C that the rows hold, for the table of conventions.
    checkpoints: take every row of a run, and not only its last.
    strict: a doubt about the table raises RowError.
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
  # Of the other counts only the exponents are shown, which few replicates tell well enough.
  quick = dataclasses.replace(options, replicates=50)
  fit = lambda rows, columns: analyse(_observe(rows, columns, role, checkpoints)[0], quick)
  return dataclasses.replace(result, conventions=diagnostics.conventions(rows, columns, fit))


def _observe(rows, columns, role, checkpoints) -> tuple[table.Observations, list[str]]:
  """The rows that count, and what is doubtful about them."""
  if isinstance(rows, table.Observations):
    return rows, []
  observations = table.observe(rows, columns, role)
  doubts.check_units(observations)
  sentence = None
  if not checkpoints:
    observations, sentence = doubts.last_of_each_run(observations)
  return observations, [*([sentence] if sentence else []), *doubts.about(observations)]


def analyse(rows: table.Observations, options: Options, curves: Mapping | None = None) -> Analysis:
  """`fit_results` of rows that were read, under one count of N and C."""
  if options.replicates < 1:
    raise LawError(
      f'{options.replicates} bootstrap replicates tell no interval; ask for 1 or more.'
    )
  rows = _without_highest(rows, options.drop_highest)
  _check_law(options.law, rows)
  cost = fit_cost(rows.params, rows.tokens, rows.flops)
  refusals: dict[str, str] = {}
  rule = options.rule or _default_rule(options)
  forecasting.check(rule)
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
    rows, cost, envelope_of_curves, isoflop, fit, spread, refusals, level=options.level,
    rule=rule,
  )  # fmt: skip
  return dataclasses.replace(result, doubts=about_groups, notes=tuple(diagnostics.notes(result)))


def _default_rule(options: Options) -> str:
  """Learned priors have a law of their own, so that another one, or a held parameter, asks for another rule."""
  chosen = options.law != _CHINCHILLA or options.fixed or options.tied
  return 'mean of approaches' if chosen else forecasting.DEFAULT


def _about_groups(rows, fit: fitted.Fit | None) -> tuple[str, ...]:
  """Whether one table holds several studies, by the losses and by the residuals of the law."""
  told = groups.two_groups(rows)
  if fit is not None and (studies := groups.several_studies(rows, fit)):
    return tuple(studies)
  if fit is not None:
    told = told or groups.step_in(rows, fit)
  return (told,) if told else ()


def _check_law(law: Law, rows: table.Observations) -> None:
  """Approach 3 splits a budget into N and D, so it wants a law of those, and of what the rows hold."""
  if not {'params', 'tokens'} <= set(law.inputs) <= set(rows.inputs):
    raise LawError(
      f'{law.name} is a law of {", ".join(law.inputs)}; approach 3 fits laws of params and tokens '
      '(such as Chinchilla). For this one, call scaling.fit in Python with an array of each input.'
    )


def _without_highest(rows: table.Observations, count: int) -> table.Observations:
  if count <= 0:
    return rows
  highest = np.argsort(rows.loss, kind='stable')[-count:]
  keep = np.setdiff1d(np.arange(len(rows)), highest)
  dropped = tuple((str(rows.run[i]), f'one of the {count} highest losses') for i in highest)
  return dataclasses.replace(rows.take(keep), excluded=rows.excluded + dropped)


def _approach1(curves, rows, cost, refusals):
  if not curves:
    return None
  params = {str(run): float(n) for run, n in zip(rows.run, rows.params, strict=True)}
  try:
    return envelope.envelope({r: c for r, c in curves.items() if r in params}, params, cost)
  except allocation.NoAllocation as e:
    refusals['approach 1'] = str(e)
    return None


def _approach2(rows, cost, options: Options, refusals) -> allocation.Allocation | None:
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
  """The law, or where the rows do not determine it its tied form, unless that fits significantly worse."""
  law, tied = options.law, laws.TiedChinchilla()
  try:
    return law_fit.fit(law, rows.inputs, rows.loss, **options.of_the_law())
  except fitted.NotIdentifiable as error:
    refusals['approach 3'] = str(error)
  if law == tied:
    return None
  # Names and starts are of the other law.
  grid = options.starts if isinstance(options.starts, str) else 'grid'
  arguments = options.of_the_law() | {'fixed': None, 'tied': None, 'starts': grid}
  try:
    fit = law_fit.fit(tied, rows.inputs, rows.loss, **arguments)
  except fitted.NotIdentifiable as error:
    refusals['approach 3, tied'] = str(error)
    return None
  if (worse := _how_much_worse(fit, rows, options)) is not None:
    refusals['approach 3, tied'] = worse
    return None
  return fit


def _how_much_worse(fit: fitted.Fit, rows, options: Options) -> str | None:
  """A sentence where the tied law fits significantly worse than the one that it would stand for."""
  try:
    arguments = options.of_the_law() | {'check': False}
    free = law_fit.fit(options.law, rows.inputs, rows.loss, **arguments)
  except fitted.NotIdentifiable:  # fewer rows than parameters
    return None
  spare = len(free.problem.free) - len(fit.problem.free)
  if spare <= 0 or free.objective <= 0:
    return None
  ratio = fit.objective / free.objective
  if len(rows) * math.log(ratio) < stats.chi2.ppf(0.95, spare):
    return None
  return (
    f'TiedChinchilla fits significantly worse than {options.law.name} (its objective is '
    f'{ratio:.3g} times as large), so it does not stand in for it.'
  )


def _resampling(resample: str | None, rows) -> tuple[str, np.ndarray | None]:
  clusters = {'cluster by run': rows.run, 'cluster by budget': rows.budget}
  if resample is None:
    # The rows of one run share its luck; fewer than three runs cannot be redrawn.
    runs = len(np.unique(rows.run))
    clustered = 'run' in rows.columns and 3 <= runs <= 0.7 * len(rows)
    resample = 'cluster by run' if clustered else 'residual'
  if resample in clusters:
    return 'cluster', clusters[resample]
  if resample not in ('residual', 'pairs'):
    raise LawError(f'resample={resample!r} is none of residual, pairs, {", ".join(clusters)}.')
  return resample, None
