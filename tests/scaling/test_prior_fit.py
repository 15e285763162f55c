"""The default rule of a forecast: its priors give way to rows, and its intervals widen with reach."""

import numpy as np
import pytest

from research.core.errors import UserError
from research.scaling import forecasting, laws, planning, prior_fit, rows, serial, tables
from research.scaling.fitting import fit_results

TRUE = {'E': 1.69, 'A': 406.4, 'B': 410.7, 'alpha': 0.34, 'beta': 0.28}


def sweep(noise=0.0, seed=0):
  c, k = np.meshgrid(np.geomspace(1e18, 1e20, 6), np.geomspace(0.25, 4, 7))
  n = planning.optimum(laws.Chinchilla(), TRUE, c.ravel())[0] * k.ravel()
  d = c.ravel() / (6 * n)
  loss = laws.Chinchilla()(TRUE, params=n, tokens=d)
  return n, d, loss * np.exp(noise * np.random.default_rng(seed).normal(size=n.size)), c.ravel()


def test_slopes_are_those_of_finite_differences():
  rng = np.random.default_rng(0)
  theta, x, z = rng.normal(size=6) * 0.5, rng.normal(size=9), rng.normal(size=9)
  slopes = prior_fit.evaluate(theta, x, z).slopes
  for i in range(6):
    step = np.eye(6)[i] * 1e-6
    up, down = (prior_fit.evaluate(theta + s, x, z).value for s in (step, -step))
    np.testing.assert_allclose(slopes[:, i], (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


def test_exact_rows_overrule_the_prior():
  """The prior thinks gamma to be .5; without noise the rows say 1, and at 100 times the budget it shows."""
  n, d, loss, c = sweep()
  fit = prior_fit.fit(n, d, loss, prior_fit.LEARNED, c)
  far = planning.optimum(laws.Chinchilla(), TRUE, 100 * c.max())
  assert float(np.exp(fit.predict(*far[:2])[0][0])) == pytest.approx(float(far[2]), rel=1e-3)
  values = fit.natural(fit.theta)
  told = laws.GammaChinchilla()(values, params=n, tokens=d)
  np.testing.assert_allclose(told, loss, rtol=1e-4)


def test_an_interval_widens_with_reach_and_holds_the_truth():
  n, d, loss, c = sweep(0.003)
  fit = prior_fit.fit(n, d, loss, prior_fit.LEARNED, c)
  widths = []
  for reach in (1, 10, 100):
    best = planning.optimum(laws.Chinchilla(), TRUE, reach * c.max())
    low, high = fit.interval(*best[:2], 0.9)
    assert low < best[2] < high
    widths.append(float(high[0] - low[0]))
  assert widths == sorted(widths)


def test_a_diverged_run_moves_little():
  n, d, loss, c = sweep(0.003)
  spoilt = loss.copy()
  spoilt[3] *= 1.5
  one, other = (prior_fit.fit(n, d, y, prior_fit.LEARNED, c) for y in (loss, spoilt))
  far = 1e10, 2e11
  assert float((one.predict(*far)[0] - other.predict(*far)[0])[0]) == pytest.approx(0, abs=0.005)


@pytest.fixture(scope='module')
def analysis():
  n, d, loss, c = sweep(0.003)
  names = ('params', 'tokens', 'loss', 'budget')
  table = [dict(zip(names, row, strict=True)) for row in zip(n, d, loss, c, strict=True)]
  return fit_results(rows.observe(table), replicates=50)


def test_it_is_the_default_and_the_others_can_be_chosen(analysis):
  assert analysis.rule == forecasting.DEFAULT == 'learned priors'
  told = analysis.forecast(1e21)
  best = planning.optimum(laws.Chinchilla(), TRUE, 1e21)
  assert told.loss == pytest.approx(float(best[2]), rel=0.01)
  assert told.loss_low < best[2] < told.loss_high
  assert told.params == pytest.approx(float(best[0]), rel=0.1)
  assert 6 * told.params * told.tokens == pytest.approx(1e21, rel=1e-6)
  assert serial.from_json(serial.to_json(analysis)).forecast(1e21) == told
  point = analysis.forecast(params=told.params, tokens=told.tokens)
  assert point.loss == pytest.approx(told.loss, rel=1e-9)
  with pytest.raises(UserError, match="There is no rule 'learned'"):
    forecasting.check('learned')


def test_a_parameter_that_is_held_asks_for_a_rule_that_has_it(analysis):
  held = fit_results(analysis.rows, fixed={'E': 1.69}, replicates=20)
  assert held.rule == 'mean of approaches'


def test_an_exact_surface_is_forecast_within_a_tenth_of_a_percent_and_surely():
  """Exponents far from the prior's too, at ten and at a hundred times the largest budget."""
  for true in (TRUE, {'E': 0.5, 'A': 60.0, 'B': 5.0, 'alpha': 0.25, 'beta': 0.08}):
    c, k = np.meshgrid(np.geomspace(1e18, 1e20, 6), np.geomspace(0.25, 4, 7))
    n = planning.optimum(laws.Chinchilla(), true, c.ravel())[0] * k.ravel()
    d = c.ravel() / (6 * n)
    loss = laws.Chinchilla()(true, params=n, tokens=d)
    fit = prior_fit.fit(n, d, loss, prior_fit.LEARNED, c.ravel())
    for reach in (10, 100):
      *at, best = planning.optimum(laws.Chinchilla(), true, reach * c.max())
      low, high = fit.interval(*at, 0.9)
      assert float(np.exp(fit.predict(*at)[0][0])) == pytest.approx(float(best), rel=1e-3)
      assert low < best < high < low * 1.01


def test_an_exact_drifting_grid_is_forecast_within_a_tenth_of_a_percent(shared_data):
  """The mean of approaches is 8.6% off the loss of this one: its exponents lie far apart (.465, .155)."""
  seen = rows.observe(tables.read(shared_data / 'cases' / 'asymmetric_drift.csv').rows)
  fit = prior_fit.fit(seen.params, seen.tokens, seen.loss, prior_fit.LEARNED, seen.flops)
  true = {'E': 1.69, 'A': 406.4, 'B': 410.7, 'alpha': 0.465, 'beta': 0.155}
  *at, best = planning.optimum(laws.Chinchilla(), true, 10 * seen.flops.max())
  low, high = fit.interval(*at, 0.9)
  assert float(np.exp(fit.predict(*at)[0][0])) == pytest.approx(float(best), rel=1e-3)
  assert low < best < high < low * 1.01
  drawn = planning.optimum(laws.GammaChinchilla(), fit.natural(fit.theta), 10 * seen.flops.max())
  assert float(drawn[1]) == pytest.approx(float(at[1]), rel=1e-3)
