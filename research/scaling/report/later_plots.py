"""Figures of two-step forecasts, and of coverage against attempts. Each returns a matplotlib Figure."""

import numpy as np

from research.scaling.report.figure import ACCENT, INK, SECOND, log_scale, new_figure
from research.scaling.sampling_fit import FittedCoverage
from research.scaling.two_step import TwoSteps

POINTS = 120  # of a line
BEYOND = 0.15  # how far a line goes beyond the rows, as a share of their range


def two_steps(steps: TwoSteps):
  """Left: the fitted loss of each row against the measured one. Right: the task's metric against its loss.

  A law of N and D is a surface, so that the left panel shows it row by row. Its line is a perfect fit.
  """
  figure, (first_axes, second_axes) = new_figure(2)
  first = steps.first.fit
  second = steps.second.fit
  first_axes.plot(first.observed, first.fitted, 'o', color=SECOND, markersize=4)
  ends = [
    min(first.observed.min(), first.fitted.min()),
    max(first.observed.max(), first.fitted.max()),
  ]
  first_axes.plot(ends, ends, color=INK, linewidth=0.8)
  misses = 100 * np.abs(first.fitted / first.observed - 1)
  first_axes.set(
    xlabel='measured task loss', ylabel='fitted task loss',
    title=f'Step 1, {first.law.name}: {np.mean(misses):.2g}% mean error',
  )  # fmt: skip
  loss = second.data['x'][steps.joint]
  measured = loss > 0  # an anchor at a loss of 0 is not a measurement, and would squeeze all others
  low = loss[measured].min()
  high = loss[measured].max()
  margin = BEYOND * (high - low)
  line = np.linspace(max(low - margin, 1e-6), high + margin, POINTS)
  parameters = {name: values[:, None] for name, values in steps.second.bootstrap.parameters.items()}
  band = steps.second.bootstrap.interval(second.law(parameters, **{steps.joint: line}), steps.level)
  second_axes.fill_between(
    line, *band, color=ACCENT, alpha=0.2, linewidth=0, label=f'{steps.level:.0%} interval'
  )
  second_axes.plot(
    loss[measured], second.observed[measured], '.', color=SECOND, markersize=3, label='rows'
  )
  second_axes.plot(line, second.predict(**{steps.joint: line}), color=ACCENT, label=second.law.name)
  second_axes.invert_xaxis()  # better models to the right
  second_axes.set(xlabel='task loss', ylabel=second.law.output, title=f'Step 2: {second.law.name}')
  second_axes.legend(frameon=False, fontsize=8)
  return figure


def coverage(fitted: FittedCoverage):
  """-ln coverage against k on logarithmic axes, where the power law is straight, and the beta-binomial."""
  figure, (ax,) = new_figure(size=(6.0, 4.2))
  inside = (fitted.coverage > 0) & (fitted.coverage < 1)
  k = np.geomspace(1, fitted.ks.max() * 10, POINTS)
  ax.plot(
    k, fitted.parameters['a'] * k ** -fitted.parameters['b'], '--', color=SECOND, label='power law'
  )
  forecast = -np.log(fitted.beta_binomial.pass_at(k))
  ax.plot(k, forecast, color=ACCENT, label='beta-binomial of the counts')
  ax.plot(
    fitted.ks[inside],
    -np.log(fitted.coverage[inside]),
    'o',
    color=INK,
    markersize=4,
    label='measured',
  )
  log_scale(ax, 'x')
  log_scale(ax, 'y')
  ax.set(
    xlabel='attempts k', ylabel='-ln coverage', title=f'Coverage of {fitted.problems} problems'
  )
  ax.legend(frameon=False, fontsize=8)
  return figure
