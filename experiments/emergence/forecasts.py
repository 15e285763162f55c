"""The forecasts of the larger sizes, by two steps through the loss of an answer and by one; and the verdict."""

import sums

from research.core.errors import UserError, in_a_line
from research.scaling import any_law, emergence, laws
from research.scaling.columns import Columns
from research.scaling.options import Options
from research.scaling.two_step import TwoSteps, fit_two_steps

# The answer follows from the question, so that nothing is left of a perfect model's loss.
# E, floor and ceiling are held.
HELD = {'E': 0.0, 'floor': sums.GUESS, 'ceiling': 1.0}
PERFECT = {'loss': 0.0, 'accuracy': 1.0}
COLUMNS = Columns(loss_unit='nats')
POINTS = 40  # of a curve in the figure


def of_condition(rows: list[dict], mode: str, shots: int | None = None) -> list[dict]:
  """The columns of the laws, of the rows of a mode and a number of shots, None for any."""
  return [
    {'run': row['run'], 'flops': row['flops'], 'loss': row['nats'], 'accuracy': row['accuracy']}
    for row in rows
    if row['mode'] == mode and shots in (None, row['shots'])
  ]


def nats_of_compute(rows: list[dict], mode: str, shots: int, examples: int) -> any_law.FittedLaw:
  """Compute to the nats of the answer: the first of two steps, also where the second cannot be fitted."""
  del examples  # nats are no counts
  options = Options(fixed={'E': HELD['E']}, replicates=400)
  chosen = of_condition(rows, mode, shots)
  return any_law.fit_law(chosen, laws.ComputeOptimal(), COLUMNS, None, options)


def two_steps(rows: list[dict], mode: str, shots: int, examples: int) -> TwoSteps:
  """Compute to the nats of the answer, and from them to the accuracy by one curve for all shots of the mode."""
  return fit_two_steps(
    of_condition(rows, mode, shots),
    laws.ComputeOptimal(),
    laws.AccuracyOfLoss(),
    second_rows=of_condition(rows, mode),
    anchors=[PERFECT],
    columns=COLUMNS,
    role=None,
    options=Options(examples=examples, fixed=HELD, replicates=400),
  )


def one_step(rows: list[dict], mode: str, shots: int, examples: int) -> any_law.FittedLaw:
  """Compute to the accuracy."""
  held = {name: HELD[name] for name in ('floor', 'ceiling')}
  options = Options(examples=examples, fixed=held, replicates=400)
  chosen = of_condition(rows, mode, shots)
  return any_law.fit_law(chosen, laws.AccuracyOfCompute(), COLUMNS, None, options)


def name_of(mode: str, shots: int, width: int, what: str) -> str:
  """The name of a forecast."""
  return f'{mode}, {shots} shots, width {width}: {what}'


def make(rows: list[dict], expected: dict[int, float], examples: int) -> dict:
  """The forecasts of every condition at the larger sizes, and the curves that they lie on.

  Args:
    rows: of the smaller sizes.
    expected: {width: its training FLOPs}.
    examples: how many sums an accuracy is of.
  """
  found, curves = {}, {}
  for mode in sums.MODES:
    for shots in sums.SHOTS:
      condition = (rows, mode, shots, examples)
      first = _fitted(nats_of_compute, condition)
      chained = _fitted(two_steps, condition)
      alone = _fitted(one_step, condition)
      for width, flops in expected.items():
        parts = {
          'nats': _value(first, flops),
          'accuracy': _value(chained, flops),
          'accuracy in one step': _value(alone, flops),
        }
        found |= {name_of(mode, shots, width, what): value for what, value in parts.items()}
      if isinstance(chained, TwoSteps):
        curves[f'{mode}, {shots} shots'] = _curve(rows, chained, max(expected.values()))
  return {'examples': examples, 'flops': expected, 'forecasts': found, 'curves': curves}


def _fitted(fit, condition: tuple):
  """The fit, or the sentence that says why the rows determine none."""
  try:
    fitted = fit(*condition)
  except UserError as error:
    reason = in_a_line(error)
    print(f'{condition[1]}, {condition[2]} shots: {fit.__name__}: {reason}', flush=True)
    return reason
  print(f'{condition[1]}, {condition[2]} shots:\n{fitted}', flush=True)
  return fitted


def _value(fitted, flops: float) -> dict:
  """A forecast as `study_runs.compare` reads it."""
  if isinstance(fitted, str):
    return {'value': None, 'why': fitted}
  value, low, high = fitted.value_at(flops=flops)
  forecast = {'value': value, 'low': low, 'high': high, 'at': {'flops': flops}}
  if isinstance(fitted, TwoSteps):
    forecast['measured_low'], forecast['measured_high'] = fitted.measured_at(flops=flops)
  return forecast


def _curve(rows: list[dict], fitted: TwoSteps, most: float) -> list[list[float]]:
  """[FLOPs, nats, accuracy] from the smallest run to `most`."""
  least = min(row['flops'] for row in rows)
  flops = [least * (most / least) ** (i / (POINTS - 1)) for i in range(POINTS)]
  return [[c, fitted.loss_at(flops=c)[0], fitted.value_at(flops=c)[0]] for c in flops]


def outcomes(rows: list[dict]) -> dict[str, list[float]]:
  """{name of a forecast: what its runs measured}."""
  measured = {}
  for row in rows:
    if row['stage'] == 'test':
      values = {
        'nats': row['nats'],
        'accuracy': row['accuracy'],
        'accuracy in one step': row['accuracy'],
      }
      for what, value in values.items():
        name = name_of(row['mode'], row['shots'], row['width'], what)
        measured.setdefault(name, []).append(value)
  return measured


def judge(rows: list[dict], examples: int) -> dict[str, dict]:
  """{condition: what all sizes together say about its emergence}."""
  verdicts = {}
  for mode in sums.MODES:
    for shots in sums.SHOTS:
      chosen = of_condition(rows, mode, shots)
      columns = [[row[name] for row in chosen] for name in ('flops', 'accuracy', 'loss')]
      found = emergence.judge(*columns, examples, sums.GUESS)
      print(f'{mode}, {shots} shots: {found}', flush=True)
      verdicts[f'{mode}, {shots} shots'] = {'verdict': found.verdict, 'says': str(found)}
  return verdicts
