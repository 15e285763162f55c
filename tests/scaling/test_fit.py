"""Approach 3: the published optimum on public data, recovery, every minimum, refusals."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from research import fit as command
from research.core import cli
from research.core.errors import UserError
from research.scaling import fitted, flags, law_fit, laws, objective, projection, rows

TRUE = {'E': 1.69, 'A': 406.4, 'B': 410.7, 'alpha': 0.34, 'beta': 0.28}


@pytest.fixture(scope='module')
def points(shared_data):
  """The 240 points of Besiroglu et al. 2024: N, D, C and loss."""
  with (shared_data / 'chinchilla_fig4.csv').open() as f:
    rows = list(csv.DictReader(f))
  n, c, loss = (
    np.array([float(r[k]) for r in rows]) for k in ('Model Size', 'Training FLOP', 'loss')
  )
  keep = np.sort(np.argsort(loss)[:-5])
  return {'params': n[keep], 'tokens': c[keep] / (6 * n[keep]), 'flops': c[keep]}, loss[keep]


def grid(noise=0.0, seed=0, true=TRUE):
  """A made-up sweep, 6 budgets of 7 sizes."""
  c, k = np.meshgrid(np.geomspace(1e18, 1e21, 6), np.geomspace(0.2, 5, 7))
  n = (0.1 * c**0.5 * k).ravel()
  d = c.ravel() / (6 * n)
  loss = laws.Chinchilla()(true, params=n, tokens=d)
  return n, d, loss * np.exp(noise * np.random.default_rng(seed).normal(size=n.size))


def test_two_rows_are_refused_with_a_sentence():
  x = {'tuning_data': np.array([1e3, 1e4]), 'scale': np.ones(2)}
  loss = np.array([3.0, 2.0])
  with pytest.raises(fitted.NotIdentifiable, match='2 rows'):
    law_fit.fit(laws.MultiplicativeTuning(), x, loss, fixed={'a': 1.0, 'E': 0.5})


def test_the_huber_optimum_of_the_replication(points):
  x, loss = points
  found = law_fit.fit(laws.Chinchilla(), x, loss)
  # Besiroglu et al. 2024's data; the optimum itself to all digits given, objective to 1e-10 relative.
  assert found.objective == pytest.approx(1.0182740178e-3, rel=1e-9)
  want = {'A': 477.83, 'B': 2143.42, 'E': 1.81721, 'alpha': 0.34731, 'beta': 0.36717}
  for name, value in want.items():
    assert found.parameters[name] == pytest.approx(value, rel=1.5e-5)
  p = found.parameters
  assert p['beta'] / (p['alpha'] + p['beta']) == pytest.approx(0.51390, abs=1e-5)
  assert [m.kind for m in found.minima] == ['minimum']


def test_l1_is_the_replications_headline(points):
  x, loss = points
  p = law_fit.fit(laws.Chinchilla(), x, loss, robust='l1').parameters
  want = {'A': 482.01, 'B': 2085.43, 'E': 1.8169, 'alpha': 0.3478, 'beta': 0.3658}
  for name, value in want.items():
    assert p[name] == pytest.approx(value, rel=2e-4)


def test_linear_least_squares_on_the_217(points):
  x, loss = points
  some = x['flops'] < 1e21
  assert some.sum() == 217
  x = {'params': x['params'][some] / 1e6, 'tokens': x['tokens'][some] / 1e9}
  found = law_fit.fit(laws.Chinchilla(), x, loss[some], robust='l2', residuals='linear')
  want = {'E': 1.9051, 'A': 4.0005, 'B': 1.0509, 'alpha': 0.3511, 'beta': 0.4587}
  for name, value in want.items():
    assert found.parameters[name] == pytest.approx(value, abs=6e-5)
  assert (found.residuals**2).sum() == pytest.approx(0.062414, abs=6e-7)
  # Variable projection: nine points over the exponents, E, A and B solved for at each.
  few = law_fit.fit(
    laws.Chinchilla(), x, loss[some], robust='l2', residuals='linear', starts='projected'
  )
  assert few.starts == 9
  assert few.objective == pytest.approx(found.objective, rel=1e-10)
  # E, A and B are linear least squares at the exponents, as variable projection has them at every step.
  a, b = few.parameters['alpha'], few.parameters['beta']
  columns = np.stack([np.ones(217), x['params'] ** -a, x['tokens'] ** -b], 1)
  linear = np.linalg.lstsq(columns, loss[some], rcond=None)[0]
  for name, value in zip(('E', 'A', 'B'), linear, strict=True):
    assert few.parameters[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
  ('robust', 'residuals'), [('huber', 'log'), pytest.param('l2', 'linear', marks=pytest.mark.slow)]
)
def test_projected_starts_are_fewer_and_end_as_low(robust, residuals):
  """Nine starts over the exponents, with coefficients solved for, in place of 243."""
  n, d, loss = grid(0.003)
  x, options = {'params': n, 'tokens': d}, {'robust': robust, 'residuals': residuals}
  many = law_fit.fit(laws.Chinchilla(), x, loss, **options)
  few = law_fit.fit(laws.Chinchilla(), x, loss, starts='projected', **options)
  assert (many.starts, few.starts) == (243, 9)
  assert few.objective == pytest.approx(many.objective, rel=1e-9)
  for name, value in many.parameters.items():
    assert few.parameters[name] == pytest.approx(value, rel=1e-5)


def test_projected_coefficients_are_those_of_least_squares():
  """At the true exponents the start is the truth, and no step is needed."""
  n, d, loss = grid()
  law = laws.Chinchilla()
  problem = objective.Problem(law, 'l2', 'linear')
  data, y = law_fit.make_data(law, {'params': n, 'tokens': d}, loss)
  some = dataclasses.replace(problem, fixed=(('alpha', TRUE['alpha']), ('beta', TRUE['beta'])))
  (z,) = projection.starts(some, data, y, np.ones_like(y))
  for name, value in some.values(z, data['center'], np.exp).items():
    assert value == pytest.approx(TRUE[name], rel=1e-6)


def test_a_law_without_linear_parameters_has_nothing_to_project():
  n, d, loss = grid()
  with pytest.raises(laws.LawError, match='no linear parameter to project on'):
    law_fit.fit(laws.Kaplan(), {'params': n, 'tokens': d}, loss, starts='projected')
  with pytest.raises(laws.LawError, match="starts='projekted' is not one of grid, projected"):
    law_fit.fit(laws.Kaplan(), {'params': n, 'tokens': d}, loss, starts='projekted')


def test_noiseless_rows_give_the_truth_back():
  n, d, loss = grid()
  found = law_fit.fit(laws.Chinchilla(), {'params': n, 'tokens': d}, loss)
  for name, value in TRUE.items():
    assert found.parameters[name] == pytest.approx(value, rel=1e-6)


def test_more_tokens_per_unit_map_as_dimensional_analysis_says():
  n, d, loss = grid(0.003)
  one = law_fit.fit(laws.Chinchilla(), {'params': n, 'tokens': d}, loss)
  other = law_fit.fit(laws.Chinchilla(), {'params': n / 1e6, 'tokens': d / 1e9}, loss)
  p, q = one.parameters, other.parameters
  assert q['alpha'] == pytest.approx(p['alpha'], rel=1e-8)
  assert q['A'] == pytest.approx(p['A'] * 1e6 ** -p['alpha'], rel=1e-6)
  assert q['B'] == pytest.approx(p['B'] * 1e9 ** -p['beta'], rel=1e-6)
  assert other.objective == pytest.approx(one.objective, rel=1e-10)


@pytest.mark.slow
def test_ties_and_fixed_values_hold():
  n, d, loss = grid(0.003)
  x = {'params': n, 'tokens': d}
  tied = law_fit.fit(laws.Chinchilla(), x, loss, tied={'beta': 'alpha'})
  small = law_fit.fit(laws.TiedChinchilla(), x, loss)
  assert tied.parameters['beta'] == tied.parameters['alpha']
  assert tied.objective == pytest.approx(small.objective, rel=1e-9)
  fixed = law_fit.fit(laws.Chinchilla(), x, loss, fixed={'E': 1.69})
  assert fixed.parameters['E'] == 1.69
  assert fixed.objective >= law_fit.fit(laws.Chinchilla(), x, loss).objective


def test_one_model_size_is_refused_with_its_reason():
  d = np.geomspace(1e9, 1e11, 12)
  n = np.full_like(d, 1e8)
  loss = laws.Chinchilla()(TRUE, params=n, tokens=d)
  with pytest.raises(fitted.NotIdentifiable, match='every row has the same params'):
    law_fit.fit(laws.Chinchilla(), {'params': n, 'tokens': d}, loss)


def test_fewer_rows_than_parameters_are_refused():
  n, d, loss = grid()
  with pytest.raises(fitted.NotIdentifiable, match='4 rows for 5 parameters'):
    law_fit.fit(laws.Chinchilla(), {'params': n[:4], 'tokens': d[:4]}, loss[:4])


def test_a_misspelt_parameter_is_named():
  n, d, loss = grid()
  with pytest.raises(laws.LawError, match=r"no parameter 'alfa'\. Did you mean alpha"):
    law_fit.fit(laws.Chinchilla(), {'params': n, 'tokens': d}, loss, fixed={'alfa': 0.3})


def test_fitting_leaves_the_process_in_single_precision():
  n, d, loss = grid()
  law_fit.fit(laws.TiedChinchilla(), {'params': n, 'tokens': d}, loss)
  assert not jax.config.jax_enable_x64
  assert jax.numpy.ones(1).dtype == np.float32


def test_the_command_takes_columns_and_options_from_gin_and_flags_override():
  def options(*argv):
    argv = ['--results=x.csv', '--gin_file=gin/fits/chinchilla_fig4.gin', *argv]
    return flags.options(cli.parse(command.parser(), argv), command.parser().get_default)

  found = options()
  assert found['columns'] == rows.Columns(params='Model Size', flops='Training FLOP', loss='loss')
  assert (found['drop_highest'], found['resample'], found['law'].name) == (5, 'pairs', 'Chinchilla')
  found = options(
    '--tau=0.7', '--law=Kaplan', '--tokens=D', '--fix=alpha_N=0.3', '--gin.fit_results.delta=0.1'
  )
  assert (found['tau'], found['delta'], found['fixed']) == (0.7, 0.1, {'alpha_N': 0.3})
  assert found['law'] == laws.Kaplan()
  assert found['columns'].tokens == 'D'
  assert found['columns'].params == 'Model Size'
  with pytest.raises(UserError, match=r"has no argument 'detla'\. Did you mean delta"):
    options('--gin.fit_results.detla=0.1')
  with pytest.raises(UserError, match=r'FIT must be @fitting\.fit_results'):
    options('--gin.FIT=@rows.Columns')


def test_the_command_without_gin_has_only_the_flags_that_were_given():
  argv = ['--results=x.csv', '--params=N', '--bootstrap=7']
  found = flags.options(cli.parse(command.parser(), argv), command.parser().get_default)
  assert found == {'columns': rows.Columns(params='N'), 'replicates': 7}
