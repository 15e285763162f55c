"""Rounding after training, matrix by matrix: GPTQ by its definition, and what each method minimises."""

import numpy as np
import pytest

from research.quantisation import post_training, rounding
from research.quantisation.formats import FORMATS

INPUTS, OUTPUTS, GROUP = 24, 7, 8


@pytest.fixture
def problem():
  """A matrix, and the gram matrix of inputs that are correlated and of uneven size."""
  random = np.random.default_rng(0)
  matrix = random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
  x = random.normal(size=(200, INPUTS)) @ random.normal(size=(INPUTS, INPUTS))
  x *= np.exp(random.normal(size=INPUTS))
  return matrix, (x.T @ x).astype(np.float32)


def one_at_a_time(matrix, gram, scale, offset, form):
  """Optimal brain quantisation in a fixed order, as it is derived: with a new inverse after every input."""
  order = np.argsort(-np.diag(gram), kind='stable')
  gram = gram.astype(np.float64) + 0.01 * np.diag(gram).astype(np.float64).mean() * np.eye(INPUTS)
  left, rounded = matrix.astype(np.float64), np.zeros_like(matrix, np.float64)
  remaining = list(order)
  for i in order:
    inverse = np.linalg.inv(gram[np.ix_(remaining, remaining)])
    s = scale[i // GROUP]
    z = None if offset is None else offset[i // GROUP]
    rounded[i] = form.decode(form.encode(left[i], s, z), s, z)
    error = (left[i] - rounded[i]) / inverse[0, 0]
    for k, other in enumerate(remaining):
      left[other] = left[other] - inverse[0, k] * error
    remaining.remove(i)
  return rounded


@pytest.mark.parametrize(('name', 'offsets'), [('int4', True), ('int3', False), ('nf4', False)])
def test_gptq_is_optimal_brain_quantisation(problem, name, offsets):
  matrix, gram = problem
  form = FORMATS[name]
  rounded = rounding.gptq(matrix, gram, GROUP, form, offsets)
  expected = one_at_a_time(matrix, gram, rounded.scale, rounded.offset, form)
  np.testing.assert_allclose(rounded.matrix(form), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('name', 'offsets'), [('int4', True), ('int3', False), ('nf4', False)])
def test_fitted_scales_do_less_harm_to_the_outputs_of_each_group(problem, name, offsets):
  matrix, gram = problem
  form = FORMATS[name]
  fitted = rounding._fitted(matrix, gram, GROUP, form, offsets)
  plain = rounding.nearest(matrix, gram, GROUP, form, offsets)
  codes = form.encode(matrix, *rounding._wide(GROUP, *fitted))
  of_fit = matrix - rounding.Rounded(codes, *fitted).matrix(form)
  of_range = matrix - plain.matrix(form)
  ratios = []
  for start in range(0, INPUTS, GROUP):
    group = slice(start, start + GROUP)
    block = rounding._damped(gram)[group, group]
    harm = [np.sum(e[group] * (block @ e[group]), axis=0) for e in (of_fit, of_range)]
    assert np.all(harm[0] <= harm[1] * (1 + 1e-5))
    ratios.append(harm[0] / harm[1])
  assert np.mean(ratios) < 0.7


def test_codes_and_their_grid_are_found_by_least_squares(problem):
  """Against a regression of each group on its codes, with the gram matrix as the metric."""
  matrix, gram = problem
  form = FORMATS['int4']
  split = matrix.reshape(-1, GROUP, OUTPUTS)
  grid = form.scales(split, (1,), True)
  codes = form.encode(split, *grid)
  blocks = np.stack([gram[a : a + GROUP, a : a + GROUP] for a in range(0, INPUTS, GROUP)])
  scale, offset = rounding._least_squares(split, blocks, form, *grid)
  for g, block in enumerate(blocks.astype(np.float64)):
    root = np.linalg.cholesky(block).T
    for output in range(OUTPUTS):
      columns = np.stack([codes[g, :, output], np.ones(GROUP)], axis=1)
      expected = np.linalg.lstsq(root @ columns, root @ split[g, :, output], rcond=None)[0]
      # The results are rounded to float16.
      np.testing.assert_allclose(scale[g, 0, output], expected[0], rtol=1e-3)
      np.testing.assert_allclose(offset[g, 0, output], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['int3', 'int4', 'nf4', 'fp8_e4m3'])
def test_what_looks_at_the_inputs_does_less_harm_to_the_outputs(problem, name):
  matrix, gram = problem
  form = FORMATS[name]
  error = {
    method: rounding.output_error(
      matrix, function(matrix, gram, GROUP, form, False).matrix(form), gram
    )
    for method, function in post_training.METHODS.items()
    if method != 'keep'
  }
  assert error['gptq'] < 0.8 * error['nearest']
  assert error['awq'] <= error['nearest']


def test_the_error_of_outputs_is_that_of_the_outputs(problem):
  matrix, _ = problem
  random = np.random.default_rng(1)
  x = random.normal(size=(50, INPUTS))
  other = matrix + 0.1 * random.normal(size=matrix.shape)
  expected = np.sum((x @ (matrix - other)) ** 2) / np.sum((x @ matrix) ** 2)
  got = rounding.output_error(matrix, other.astype(np.float32), x.T @ x)
  assert got == pytest.approx(expected, rel=1e-4)


def test_a_corrected_matrix_is_the_damped_least_squares_solution(problem):
  matrix, _ = problem
  random = np.random.default_rng(2)
  y = random.normal(size=(50, INPUTS))
  x = y + 0.3 * random.normal(size=y.shape)
  corrected = rounding.corrected(matrix, x.T @ x, x.T @ (y - x))
  # The damping as further rows of the regression, which pull the solution to the matrix itself.
  pull = np.sqrt(0.01 * np.mean(np.sum(x * x, axis=0))) * np.eye(INPUTS)
  rows = np.concatenate([x, pull])
  wanted = np.concatenate([y @ matrix, pull @ matrix])
  expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
  np.testing.assert_allclose(corrected, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(rounding.corrected(matrix, x.T @ x, 0 * (x.T @ x)), matrix)


def test_inputs_that_are_always_zero_do_not_stop_gptq(problem):
  matrix, gram = problem
  gram[3] = gram[:, 3] = 0
  rounded = rounding.gptq(matrix, gram, GROUP, FORMATS['int4'], True)
  assert np.isfinite(rounded.matrix(FORMATS['int4'])).all()


def test_smoothing_scales_are_of_inputs_and_matrix(problem):
  matrix, gram = problem
  form = FORMATS['int8']
  rounded = rounding.smooth(matrix, gram, INPUTS, form, False)
  size = np.sqrt(np.diag(gram) / np.diag(gram).mean())
  expected = np.sqrt(size / np.abs(matrix).max(axis=1))
  np.testing.assert_allclose(rounded.input_scale, expected, rtol=1e-5)
  np.testing.assert_allclose(rounded.matrix(form), matrix, atol=0.05)
