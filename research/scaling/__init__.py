"""Scaling laws: fits, forecasts and plans from rows of results, this project's or anybody's."""

from research.scaling.analysis import Analysis
from research.scaling.any_law import FittedLaw, fit_law
from research.scaling.cost import Cost
from research.scaling.fitted import Fit, NotIdentifiable
from research.scaling.fitting import fit_results
from research.scaling.forecast import Forecast, NoForecast
from research.scaling.law_fit import fit
from research.scaling.rows import Columns, Observations, RowError, observe, read_table
from research.scaling.serial import load, save

__all__ = [
  'Analysis',
  'Columns',
  'Cost',
  'Fit',
  'FittedLaw',
  'Forecast',
  'NoForecast',
  'NotIdentifiable',
  'Observations',
  'RowError',
  'fit',
  'fit_law',
  'fit_results',
  'load',
  'observe',
  'plot',
  'read_table',
  'save',
]


def plot(analysis: Analysis):
  """One matplotlib figure: the isoFLOP curves beside the fitted loss surface."""
  from research.scaling.report import plots  # matplotlib takes half a second to import

  return plots.overview(analysis)
