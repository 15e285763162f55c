"""Chooses the fit for a table and its flags: an analysis, a law alone, two steps, or coverage of samples."""

import dataclasses

from research.core.errors import UserError
from research.scaling import any_law, flags, laws, sampling_fit, selection, two_step
from research.scaling.columns import Columns
from research.scaling.fitting import fit_results
from research.scaling.options import Options


def fit(picked: list[dict], parsed, chosen: dict, every: list[dict]):
  """Fits what the flags of `research.fit` ask for: an Analysis, a FittedLaw, TwoSteps or a FittedCoverage.

  Args:
    picked: the rows after --where and --pick.
    parsed: the parsed flags.
    chosen: `flags.options` of them.
    every: the rows before --pick, from which --then_pick picks those of the second step.

  Raises:
    UserError: a flag has no meaning for this fit.
  """
  law = chosen.get('law', Options().law)
  _check_points(law, parsed.predict)
  alone = 'law' in chosen and not flags.is_of_params_and_tokens(law)
  if parsed.then or alone:
    _refuse(
      parsed, ('forecast', 'report'), 'this law splits no budget: use --predict=NAME=X,NAME=X'
    )
  if not parsed.then:
    _refuse(parsed, ('then_pick', 'anchor'), 'it is of the second step, so give --then=LAW too')
  if parsed.then:
    second_rows = selection.pick(every, parsed.then_pick) if parsed.then_pick else None
    anchors = flags.points(parsed.anchor, '--anchor')
    rest = _arguments({'law': law, **chosen}, parsed)
    second = flags.law(parsed.then)
    return two_step.fit_two_steps(
      picked, law, second, second_rows=second_rows, anchors=anchors, **rest
    )
  if not alone:
    _refuse(parsed, ('examples',), f'{law.name} predicts a loss, and not a share of examples')
    return fit_results(picked, **chosen)
  columns = chosen.get('columns', Columns())
  if isinstance(law, laws.CoverageOfSamples) and sampling_fit.has_counts(picked, columns):
    ignored = ('examples', 'fix', 'tie', 'robust', 'residuals', 'resample')
    _refuse(
      parsed, ignored, 'it has no effect on a table of counts, whose bootstrap draws problems'
    )
    return sampling_fit.fit_coverage(picked, **_arguments(chosen, parsed))
  if parsed.examples is not None:
    _refuse(
      parsed,
      ('robust', 'residuals', 'resample'),
      'it has no effect with --examples, whose noise is binomial',
    )
  return any_law.fit_law(picked, law, **_arguments(chosen, parsed))


def _check_points(law: laws.Law, asked: list[str]) -> None:
  """Raises UserError for a point of --predict at which `law` says nothing, before anything is fitted."""
  for text, point in zip(asked, flags.points(asked), strict=True):
    try:
      law.check_point(point)
    except laws.LawError as error:
      splits = 'flops' in point and flags.is_of_params_and_tokens(law)
      budget = ' For a budget use --forecast=FLOPS.' if splits else ''
      raise UserError(f'--predict={text}: {error}{budget}') from None


def _arguments(chosen: dict, parsed) -> dict:
  """The arguments of a fit without its law, with --examples among the options."""
  arguments = flags.of_a_law(chosen)
  del arguments['law']
  if parsed.examples is not None:
    examples = flags.number_or_column(parsed.examples)
    arguments['options'] = dataclasses.replace(arguments['options'], examples=examples)
  return arguments


def _refuse(parsed, names: tuple[str, ...], why: str) -> None:
  """Raises UserError for the first of these flags on the command line: it would be ignored."""
  for name in names:
    if getattr(parsed, name):
      raise UserError(f'--{name}: {why}.')


def tell(analysis, point: dict[str, float]) -> str:
  """The line that --predict prints: the value at a point and its interval."""
  where = 'At ' + ', '.join(f'{name} = {x:.4g}' for name, x in point.items())
  value = _with_interval(*analysis.value_at(**point))
  if not isinstance(analysis, two_step.TwoSteps):
    return f'{where}: {value}'
  second = analysis.second.fit.law
  loss = _with_interval(*analysis.loss_at(**point))
  low, high = analysis.measured_at(**point)
  return (
    f'{where}: loss {loss}, {second.output} {value}; a measurement within [{low:.5g}, {high:.5g}]'
  )


def _with_interval(value: float, low: float, high: float) -> str:
  return f'{value:.5g} [{low:.5g}, {high:.5g}]'
