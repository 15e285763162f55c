"""Scaling laws: fits, forecasts and plans from rows of results, this project's or anybody's."""

from research.core.errors import UserError
from research.scaling.analysis import Analysis
from research.scaling.any_law import FittedLaw, fit_law
from research.scaling.cost import Cost
from research.scaling.fitted import Fit, NotIdentifiable
from research.scaling.fitting import fit_results
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.law_fit import fit
from research.scaling.rows import Columns, Observations, RowError, observe, read_table
from research.scaling.sampling_fit import FittedCoverage, fit_coverage
from research.scaling.serial import load, save
from research.scaling.two_step import TwoSteps, fit_two_steps

__all__ = [
  'Analysis',
  'Columns',
  'Cost',
  'Fit',
  'FittedCoverage',
  'FittedLaw',
  'Forecast',
  'NoForecast',
  'NotIdentifiable',
  'Observations',
  'RowError',
  'TwoSteps',
  'fit',
  'fit_coverage',
  'fit_law',
  'fit_results',
  'fit_two_steps',
  'load',
  'observe',
  'plot',
  'read_table',
  'save',
]


def plot(analysis):
  """One matplotlib figure: isoFLOP curves beside the loss surface, both steps of two, or coverage against k.

  Raises:
    UserError: a law alone, which may have any inputs, has no figure.
  """
  # Matplotlib takes half a second to import.
  from research.scaling.report import later_plots, plots

  if isinstance(analysis, TwoSteps):
    return later_plots.two_steps(analysis)
  if isinstance(analysis, FittedCoverage):
    return later_plots.coverage(analysis)
  if isinstance(analysis, FittedLaw):
    raise UserError(
      'A law alone has no figure: it may have any inputs. Ask for --predict or --save.'
    )
  return plots.overview(analysis)
