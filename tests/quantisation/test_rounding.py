"""Rounding after training, matrix by matrix: GPTQ by its definition, and what each method minimises."""

import numpy as np
import pytest

from research.quantisation import rounding
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


def one_at_a_time(matrix, gram, scale, zero, form):
  """Optimal brain quantisation in a fixed order, as it is derived: with a new inverse after every input."""
  order = np.argsort(-np.diag(gram), kind='stable')
  gram = gram.astype(np.float64) + 0.01 * np.diag(gram).astype(np.float64).mean() * np.eye(INPUTS)
  left, rounded = matrix.astype(np.float64), np.zeros_like(matrix, np.float64)
  remaining = list(order)
  for i in order:
    inverse = np.linalg.inv(gram[np.ix_(remaining, remaining)])
    s = scale[i // GROUP]
    z = None if zero is None else zero[i // GROUP]
    code = form.encode((left[i] / s).astype(np.float32), z)
    rounded[i] = form.decode(code, z) * s
    error = (left[i] - rounded[i]) / inverse[0, 0]
    for k, other in enumerate(remaining):
      left[other] = left[other] - inverse[0, k] * error
    remaining.remove(i)
  return rounded


@pytest.mark.parametrize(('name', 'zeros'), [('int4', True), ('int3', False), ('nf4', False)])
def test_gptq_is_optimal_brain_quantisation(problem, name, zeros):
  matrix, gram = problem
  form = FORMATS[name]
  rounded = rounding.gptq(matrix, gram, GROUP, form, zeros)
  zero = rounded.zero if zeros else None
  expected = one_at_a_time(matrix, gram, rounded.scale, zero, form)
  np.testing.assert_allclose(rounded.matrix(form), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['int3', 'int4', 'nf4', 'fp8_e4m3'])
def test_what_looks_at_the_inputs_does_less_harm_to_the_outputs(problem, name):
  matrix, gram = problem
  form = FORMATS[name]
  error = {
    method: rounding.output_error(
      matrix, function(matrix, gram, GROUP, form, False).matrix(form), gram
    )
    for method, function in rounding.METHODS.items()
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
