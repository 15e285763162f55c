"""The forecast of a sweep: written down before the run that tests it, and compared with it afterwards."""

import dataclasses
import datetime
import json
import statistics

from research.core import storage, text
from research.core.errors import UserError
from research.designs.plan import Size, nearest
from research.scaling import Analysis
from research.sweeps.folder import Folder
from research.sweeps.sweep import Sweep


def register_forecast(
  sweep: Sweep, analysis: Analysis, rungs: list[Size], length: int, folder: Folder
) -> dict:
  """Writes forecast.json and adds the runs that test it to the plan; where that was done, reads it.

  A forecast is written once: nobody may fit the law again to an outcome that is known. The run that tests it
  has the size of the ladder nearest to the optimum, and the forecast is of that run's own N and D.

  Args:
    length: target tokens of an example.

  Raises:
    UserError: the optimum lies at an end of the ladder.
  """
  path = folder.path / 'forecast.json'
  if path.exists():
    return json.loads(path.read_text())
  budget = max(sweep.design.budgets) * sweep.forecast
  best = analysis.forecast(budget)
  size = nearest(rungs, best.params)
  seeds = range(sweep.forecast_seeds)
  tests = [sweep.design.run(budget, size, length, 'forecast', seed) for seed in seeds]
  planned = tests[0]  # the others differ in their seed alone
  if planned.size in (rungs[0], rungs[-1]):
    raise UserError(
      f'the laws put the optimum of {budget:.3g} FLOPs at {text.si(best.params)} parameters, the '
      f'end of the ladder ({planned.size.name}): widen Ladder.widths and start again, nothing '
      'finished is lost.'
    )
  expected = analysis.forecast(planned.flops, params=planned.size.params, tokens=planned.tokens)
  forecast = {
    'registered': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'runs': [run.name for run in tests],
    'optimal_params': best.params,
    'optimal_tokens': best.tokens,
    'forecast': dataclasses.asdict(expected),
  }
  folder.register(tests)
  storage.write_atomic(path, json.dumps(forecast, indent=1) + '\n')
  return forecast


def outcomes(folder: Folder, forecast: dict) -> list[float]:
  """The losses of those runs that test the forecast and have finished."""
  rows = folder.rows([run for run in folder.plan() if run.name in forecast['runs']])
  return [row['loss'] for row in rows if row['status'] == 'finished']


def show_forecast(folder: Folder, forecast: dict) -> None:
  """Prints the forecast beside its outcome."""
  expected, name = forecast['forecast'], forecast['runs'][0]
  print(
    f'forecast, registered {forecast["registered"]}: {name} will have a loss of '
    f'{expected["loss"]:.4f} [{expected["loss_low"]:.4f}, {expected["loss_high"]:.4f}] '
    f'({expected["method"]})'
  )
  if not (losses := outcomes(folder, forecast)):
    print(f'outcome: none, {name} did not finish; its reason stands in the table of runs')
    return
  outcome = statistics.mean(losses)
  seeds = f', the mean of {len(losses)} seeds: {", ".join(f"{x:.4f}" for x in losses)}'
  error = f'{expected["loss"] / outcome - 1:+.2%}'
  print(f'outcome: {outcome:.4f}{seeds if len(losses) > 1 else ""}; the forecast is off by {error}')
