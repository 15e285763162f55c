"""pass@k of counted successes, and what a beta-binomial forecasts."""

import csv
import math

import numpy as np
import pytest

from research.core.errors import UserError
from research.scaling import repeated_sampling

# The exponents of -ln(coverage) ~ k^-b of Pythia on 128 MATH problems, 10,000 attempts each; over all k, and
# over k >= 10 as measured and as a beta-binomial of the counts forecasts them.
PYTHIA = {
  '12B': (0.370, 0.369, 0.360), '6.9B': (0.348, 0.345, 0.340), '2.8B': (0.336, 0.332, 0.318),
  '1B': (0.315, 0.318, 0.305), '410M': (0.286, 0.286, 0.278), '160M': (0.280, 0.279, 0.286),
  '70M': (0.194, 0.198, 0.195),
}  # fmt: skip


@pytest.mark.parametrize('n', [1, 2, 7, 40])
def test_pass_at_k_is_the_closed_form(n):
  """Against exact integers, for every c and k."""
  for c in range(n + 1):
    for k in range(1, n + 1):
      exact = 1 - math.comb(n - c, k) / math.comb(n, k)
      assert repeated_sampling.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-14), (c, k)


def test_pass_at_k_is_exact_where_binomials_overflow():
  assert repeated_sampling.pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-12)
  assert repeated_sampling.pass_at_k(10_000, 3, 1) == pytest.approx(3e-4, rel=1e-12)
  assert repeated_sampling.pass_at_k([4, 4], [0, 4], 2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
  ('counts', 'why'),
  [
    ((10, 11, 1), 'correct must not be above samples'),
    ((10, 2, 11), 'k must not be above samples'),
    ((10, 2, 0), 'k must be 1 or more'),
    ((10, 2.5, 1), 'correct must be whole numbers'),
    ((10, np.nan, 1), 'correct must be whole numbers'),
    ((0, 0, 1), 'samples must be 1 or more'),
  ],
)
def test_counts_that_make_no_sense_are_refused(counts, why):
  with pytest.raises(UserError, match=why):
    repeated_sampling.pass_at_k(*counts)


def test_a_beta_binomial_is_found_from_its_counts():
  """2000 made-up problems: the maximum of the likelihood is near the truth, and its coverage is the mean."""
  rng = np.random.default_rng(0)
  truth = repeated_sampling.BetaBinomial(0.4, 6.0)
  correct = rng.binomial(500, rng.beta(truth.alpha, truth.beta, 2000))
  found = repeated_sampling.fit_beta_binomial(np.full(2000, 500), correct)
  assert found.alpha == pytest.approx(truth.alpha, rel=0.06)
  assert found.beta == pytest.approx(truth.beta, rel=0.12)
  ks = np.array([1, 10, 100])
  np.testing.assert_allclose(
    repeated_sampling.coverage_at(500, correct, ks), found.pass_at(ks), atol=0.01
  )
  with pytest.raises(UserError, match='problems that differ'):
    repeated_sampling.fit_beta_binomial([10, 10], [5, 5])


def test_the_exponents_of_pythia(shared_data):
  """Known to three digits over the grid of another analysis; ours is 1, 2, 5, 10, ..., so within .007."""
  with (shared_data / 'monkeys_pythia_math.csv').open() as f:
    table = list(csv.DictReader(f))
  ks = repeated_sampling.grid_of_k(10_000)
  for size, (everywhere, measured, forecast) in PYTHIA.items():
    counts = [(r['samples'], r['correct']) for r in table if r['model'] == f'Pythia {size}']
    samples, correct = np.array(counts, np.float64).T
    coverage = repeated_sampling.coverage_at(samples, correct, ks)
    found = repeated_sampling.fit_beta_binomial(samples, correct)
    late = ks >= 10
    exponents = (
      repeated_sampling.exponent_of(ks, coverage),
      repeated_sampling.exponent_of(ks[late], coverage[late]),
      found.exponent(ks[late]),
    )
    assert exponents == pytest.approx((everywhere, measured, forecast), abs=0.007), size
