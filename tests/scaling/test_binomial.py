"""Accuracies of n examples: their weights, their intervals, and what a jump of them means."""

import numpy as np
import pytest

from research.core.errors import UserError
from research.scaling import binomial, emergence, laws

LOSS = np.linspace(0.7, 2.0, 12)
TRUE = {'floor': 0.25, 'ceiling': 0.95, 'k': 6.0, 'L_half': 1.2}


@pytest.mark.slow
def test_a_fit_of_shares_is_the_quasi_likelihood_optimum():
  """Against the binomial likelihood of the sigmoid in plain scipy, floor and ceiling held.

  The quasi-score of weighted least squares at the fitted variance is the score of the binomial likelihood.
  """
  from scipy import optimize, stats

  rng = np.random.default_rng(3)
  examples = rng.integers(50, 400, len(LOSS))
  share = rng.binomial(examples, laws.AccuracyOfLoss()(TRUE, loss=LOSS)) / examples
  held = {'floor': 0.25, 'ceiling': 0.95}

  def surprise(z):
    chance = 0.25 + 0.7 / (1 + np.exp(np.exp(z[0]) * (LOSS - z[1])))
    return -stats.binom.logpmf(np.round(share * examples), examples, chance).sum()

  options = {'xatol': 1e-10, 'fatol': 1e-12, 'maxiter': 4000}
  reference = optimize.minimize(surprise, [1.8, 1.2], method='Nelder-Mead', options=options).x
  law = laws.AccuracyOfLoss()
  fit = binomial.fit(law, {'loss': LOSS}, share, examples, fixed=held, check=False)
  # Three rounds of weights leave a difference far below the standard error of some percent.
  assert fit.parameters['k'] == pytest.approx(np.exp(reference[0]), rel=2e-3)
  assert fit.parameters['L_half'] == pytest.approx(reference[1], rel=2e-4)
  spread = binomial.resample(fit, examples, replicates=50)
  assert spread.kind == 'binomial'
  low, high = spread.intervals()['L_half']
  assert low < fit.parameters['L_half'] < high


@pytest.mark.slow
def test_binomial_intervals_cover_the_truth():
  """200 made-up tables of 12 accuracies of 200 examples: 90% intervals of k and L_half."""
  law, inside = laws.AccuracyOfLoss(), {'k': 0, 'L_half': 0}
  for seed in range(200):
    rng = np.random.default_rng(seed)
    share = rng.binomial(200, law(TRUE, loss=LOSS)) / 200
    held = {'floor': 0.25, 'ceiling': 0.95}
    fit = binomial.fit(law, {'loss': LOSS}, share, 200, fixed=held, check=False)
    intervals = binomial.resample(fit, 200, replicates=200, seed=seed).intervals()
    for name in inside:
      inside[name] += intervals[name][0] <= TRUE[name] <= intervals[name][1]
  assert 170 <= inside['k'] <= 195
  assert 170 <= inside['L_half'] <= 195


@pytest.mark.slow
def test_more_scatter_than_counts_have_is_told():
  law = laws.AccuracyOfLoss()
  exact = law(TRUE, loss=LOSS)
  noisy = np.clip(exact + 0.05 * np.random.default_rng(0).normal(size=len(LOSS)), 0, 1)
  fit = binomial.fit(
    law, {'loss': LOSS}, noisy, 5000, fixed={'floor': 0.25, 'ceiling': 0.95}, check=False
  )
  assert binomial.dispersion(fit, 5000) > 10
  wide = binomial.resample(fit, 5000, replicates=50).intervals()['L_half']
  narrow = binomial.resample(fit, 20, replicates=50).intervals()['L_half']
  assert wide[1] - wide[0] > 0.2 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(
  ('share', 'examples', 'why'),
  [([0.2, 1.2], 10, 'between 0 and 1'), ([0.2, 0.4], [10, 0], '1 example or more')],
)
def test_shares_that_make_no_sense_are_refused(share, examples, why):
  with pytest.raises(UserError, match=why):
    binomial.fit(laws.AccuracyOfLoss(), {'loss': [1.0, 2.0]}, share, examples)


def test_chance_is_told_by_the_exact_tail():
  """Of 100 examples at a chance of 1/4, 32 right are within chance (tail .069) and 33 are not (.045)."""
  assert emergence.at_chance([0.32, 0.33], 100, 0.25).tolist() == [True, False]
  assert emergence.at_chance([0.0, 0.01], 100, 0.0).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize('breaks', [False, True])
def test_an_emergence_of_the_metric_and_one_of_the_model(breaks):
  """The same jump of the accuracy: over a smooth power law of the loss, and over one that bends there."""
  rng = np.random.default_rng(0)
  flops = np.geomspace(1e17, 1e22, 24)
  slope = 0.25 * np.log(flops / 1e17) if not breaks else 0.02 * np.log(flops / 1e17)
  bend = 0.45 * np.logaddexp(0, (np.log(flops) - np.log(1e20)) / 0.2) * 0.2 if breaks else 0.0
  loss = 4 * np.exp(-slope - bend) * np.exp(0.004 * rng.normal(size=len(flops)))
  middle = 0.6 if not breaks else 2.6
  accuracy = rng.binomial(500, 0.9 / (1 + np.exp(8 / middle * (loss - middle)))) / 500
  judged = emergence.judge(flops, accuracy, loss, 500, chance=0.02)
  assert judged.verdict == ('model' if breaks else 'metric'), judged
  assert ('of the model' if breaks else 'of the metric') in str(judged)


@pytest.mark.parametrize('part', [False, True])
def test_runs_of_one_compute_that_part_are_told(part):
  """Two seeds at each compute. From a compute on one of them has a third of the loss, or both have half."""
  rng = np.random.default_rng(0)
  flops = np.repeat(np.geomspace(1e10, 1e13, 8), 2) * (1 + 0.001 * rng.normal(size=16))
  skilled = (np.arange(16) >= 10) & (np.arange(16) % 2 == 0) if part else np.arange(16) >= 10
  loss = 5 * (flops / 1e10) ** -0.1 * np.where(skilled, 1 / 3 if part else 0.5, 1.0)
  loss *= np.exp(0.03 * rng.normal(size=16))
  accuracy = np.where(skilled, 0.9, 0.01)
  judged = emergence.judge(flops, accuracy, loss, 500, chance=0.011)
  assert (judged.verdict == 'seeds') == part, judged
  if part:
    assert judged.scatter[0] == pytest.approx(0.03, rel=0.6)
    assert 'no law of the compute forecasts a single run' in str(judged)


@pytest.mark.slow
def test_a_law_that_hardly_describes_the_loss_is_no_forecast():
  """One seed each of experiments/emergence: a run learns or does not, and AICc sees no break in so few rows."""
  flops = np.geomspace(4.6e9, 2.2e12, 16)
  loss = [
    6.96, 6.76, 5.09, 4.99, 4.81, 4.75, 4.70, 4.37, 3.49, 4.09, 1.17, 2.78, 0.91, 0.71, 2.45, 0.43
  ]  # fmt: skip
  correct = [0, 3, 5, 3, 5, 7, 13, 11, 31, 24, 333, 43, 401, 391, 55, 459]
  judged = emergence.judge(flops, np.array(correct) / 500, loss, 500, chance=1 / 90)
  assert judged.broken < 0.05
  assert judged.verdict == 'undecided', judged
  assert 'too little to forecast' in str(judged)


def test_nothing_emerges_where_the_first_run_is_above_chance():
  judged = emergence.judge([1e18, 1e19], [0.5, 0.6], [2.0, 1.9], 500, chance=0.25)
  assert judged.verdict == 'none'
  assert 'nothing emerges' in str(judged)
