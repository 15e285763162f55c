"""Scaling laws: fits, forecasts and plans from rows of results, this project's or anybody's."""

from research.scaling.analysis import Analysis, Forecast, NoForecast, fit_results
from research.scaling.fits import Fit, NotIdentifiable, fit
from research.scaling.planning import Cost
from research.scaling.rows import Columns, Observations, RowError, observe, read_table

__all__ = [
  'Analysis',
  'Columns',
  'Cost',
  'Fit',
  'Forecast',
  'NoForecast',
  'NotIdentifiable',
  'Observations',
  'RowError',
  'fit',
  'fit_results',
  'observe',
  'read_table',
]
