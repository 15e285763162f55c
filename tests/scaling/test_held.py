"""Parameters that a fit holds: impossible values are refused at once, and no path drops what is held."""

import csv

import numpy as np
import pytest

from research import fit as command
from research.core.errors import UserError
from research.scaling import any_law, fit_results, held, law_fit, laws, sampling_fit, two_step
from research.scaling.options import Options
from research.sweeps import estimate
from tests.scaling.test_analysis import sweep
from tests.scaling.test_fit import grid


@pytest.fixture
def table(tmp_path):
  path = tmp_path / 'ok.csv'
  rows = sweep()
  with path.open('w', newline='') as f:
    out = csv.DictWriter(f, rows[0])
    out.writeheader()
    out.writerows(rows)
  return path


@pytest.mark.parametrize(
  ('flags', 'why'),
  [
    (['--fix=E=9'], '--fix=E=9: E must be below the smallest loss of the rows, 2.694'),
    (['--fix=E=-1'], '--fix=E=-1: E must be 0 or more.'),
    (['--fix=E=nan'], '--fix=E=nan: E must be a finite number.'),
    (['--fix=alpha=-0.3'], '--fix=alpha=-0.3: alpha must be above 0, as an exponent'),
    (['--fix=beta=0'], '--fix=beta=0: beta must be above 0, as an exponent'),
    (['--fix=A=0'], '--fix=A=0: A must be above 0.'),
    (['--fix=B=-2', '--law=TiedChinchilla'], '--fix=B=-2: B must be above 0.'),
    (['--fix=alfa=1'], "--fix=alfa=1: Chinchilla has no parameter 'alfa'. Did you mean alpha?"),
    (['--fix=E=1', '--fix=E=2'], '--fix=E=2: E is given twice'),
    (['--fix=E=1', '--tie=E=A'], '--fix=E=1: E is tied too'),
    (['--tie=alpha=alpha'], '--tie=alpha=alpha: alpha is tied itself'),
    (['--fix=E=1', '--rule=learned priors'], 'which does not hold E; leave out --fix'),
    (['--tie=beta=alpha', '--rule=learned priors'], 'which does not hold beta; leave out --fix'),
    (
      ['--law=TiedChinchilla', '--fix=E=1', '--fix=A=60', '--fix=B=120', '--fix=alpha=.3'],
      '--fix leaves no parameter of TiedChinchilla to fit',
    ),
    (
      ['--law=OverTraining', '--fix=E=9', '--input', 'flops=budget'],
      '--fix=E=9: E must be below the smallest loss of the rows, 2.694',
    ),
  ],
)
def test_what_cannot_be_held_is_one_sentence_before_any_fit(table, flags, why, capsys, monkeypatch):
  def no_fit(*_, **__):
    raise AssertionError('it was fitted first')

  monkeypatch.setattr(law_fit, 'fit', no_fit)
  assert command.main([f'--results={table}', *flags]) == 2
  said = capsys.readouterr()
  assert said.err.startswith('error: ')
  assert why in said.err
  assert not said.out


def test_what_can_be_held_is_not_refused():
  for law, name, value in (
    (laws.Chinchilla(), 'E', 0),
    (laws.PostTrainingQuantization(), 'g_N', 0.0),  # a law without this input
    (laws.MultiplicativeTuning(), 'a', 0.0),
    (laws.AccuracyOfLoss(), 'floor', 0.0),
    (laws.LossOfCompute(), 'b', -1.0),
    (laws.CriticalBatch(), 'a', -0.5),
  ):
    assert held.why_not(law, name, value, np.array([0.5, 0.7])) is None
  assert held.why_not(laws.AccuracyOfLoss(), 'floor', 1.5) == 'floor must be from 0 to 1.'


@pytest.mark.parametrize('law', [laws.Chinchilla(), laws.GammaChinchilla()])
def test_the_law_that_comes_in_holds_what_is_fixed(law):
  """Five rows do not determine Chinchilla with E held, but they do TiedChinchilla."""
  found = fit_results(sweep()[::4], law=law, fixed={'E': 1.35}, replicates=20, conventions=False)
  assert 'not identifiable' in found.refusals['approach 3']
  assert found.approach3.law.name == 'TiedChinchilla'
  assert found.approach3.parameters['E'] == 1.35
  assert (found.bootstrap.parameters['E'] == 1.35).all()
  assert found.exponents()
  lowest = float(found.optimum(1e30).loss)
  assert lowest == pytest.approx(1.35, abs=0.01)


@pytest.mark.parametrize(
  ('options', 'why'),
  [
    ({'fixed': {'beta': 0.3}}, 'has no beta of Chinchilla to hold; leave out --fix=beta'),
    ({'tied': {'beta': 'E'}}, 'has no beta of Chinchilla to hold; leave out --tie=beta'),
    # In this law A is within a power: its value means another thing.
    (
      {'law': laws.GammaChinchilla(), 'fixed': {'A': 60.0}},
      'has no A of GammaChinchilla to hold; leave out --fix=A',
    ),
  ],
)
def test_a_law_that_cannot_hold_what_is_fixed_does_not_come_in(options, why):
  with pytest.raises(UserError, match=why):
    fit_results(sweep()[::4], **options, replicates=20, conventions=False)


def test_a_tie_that_the_other_law_has_anyway_is_held_by_it():
  assert held.in_place_of(laws.Chinchilla(), {'E': 1.0}, {'beta': 'alpha'}) == ({'E': 1.0}, {})
  assert held.in_place_of(laws.Chinchilla(), {}, {'B': 'A'}) == ({}, {'B': 'A'})


def test_the_text_says_which_of_its_numbers_do_not_hold_it():
  rows = sweep()
  free = str(fit_results(rows, replicates=20, conventions=False))
  assert 'does not hold' not in free
  assert 'they leave' not in free
  known = str(fit_results(rows, fixed={'alpha': 0.3}, replicates=20, conventions=False))
  assert 'Note: approach 2 does not hold alpha' in known
  assert 'decides; they leave alpha free.' in known
  alone = fit_results(rows, fixed={'alpha': 0.3}, rule='law', replicates=20, conventions=False)
  assert 'does not hold' not in str(alone)


def test_one_free_parameter_is_fitted():
  n, d, loss = grid(0.003)
  some = {'E': 1.69, 'A': 406.4, 'B': 1e-9, 'alpha': 0.34}
  found = law_fit.fit(laws.Chinchilla(), {'params': n, 'tokens': d}, loss, fixed=some, check=False)
  assert law_fit._no_better_than_zero(found) == []


def test_both_steps_are_checked_before_the_first_is_fitted(monkeypatch):
  def no_fit(*_, **__):
    raise AssertionError('it was fitted first')

  monkeypatch.setattr(any_law, 'fit_law', no_fit)
  rows = [{'flops': 1e20 * k, 'loss': 1 / k, 'accuracy': 0.1 * k} for k in (1, 2, 4, 8)]
  steps = laws.LossOfCompute(), laws.AccuracyOfLoss()
  with pytest.raises(laws.LawError, match=r'--fix=floor=2: floor must be from 0 to 1'):
    two_step.fit_two_steps(rows, *steps, options=Options(fixed={'floor': 2.0}))


def test_counts_of_attempts_hold_nothing():
  rows = [{'samples': 100, 'correct': k} for k in range(10)]
  with pytest.raises(UserError, match='holds and ties no parameter'):
    sampling_fit.fit_coverage(rows, options=Options(fixed={'b': 0.3}))


def test_a_simulated_sweep_has_what_is_known():
  class Size:
    params = 1e6

  class Planned:
    size = Size
    tokens = 2e7

  known = held.of_chinchilla(laws.TiedChinchilla(), {'E': 3.0, 'alpha': 0.5})
  law = estimate.usual_law([Planned], known)
  assert (law['E'], law['alpha'], law['beta']) == (3.0, 0.5, 0.5)
  assert laws.Chinchilla()(law, params=1e6, tokens=2e7) == pytest.approx(4.0)
  assert held.of_chinchilla(laws.GammaChinchilla(), {'E': 3.0, 'alpha': 0.5}) == {'E': 3.0}


def test_a_forecast_says_how_far_it_is_from_the_runs():
  analysis = fit_results(sweep(), replicates=20, conventions=False)
  assert '(0.001x the smallest fitted)' in str(analysis.forecast(1e10))
  assert '(10x the largest fitted)' in str(analysis.forecast(3e15))
  assert '(0.33x the largest fitted)' in str(analysis.forecast(1e14))
  known = fit_results(sweep(), fixed={'E': 1.2}, replicates=20, conventions=False)
  assert '(0.001x the smallest fitted)' in str(known.forecast(1e10))
