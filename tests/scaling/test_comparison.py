"""Laws compared by AICc, and the misfit of a law in a sentence: found where it is, silent where it is not."""

import numpy as np
import pytest

from research.scaling import comparison, diagnostics, laws, rows, tables


@pytest.fixture(scope='module')
def design():
  rng = np.random.default_rng(0)
  n = np.exp(rng.uniform(np.log(2e7), np.log(5e9), 60))
  return n, n * np.exp(rng.uniform(np.log(2), np.log(100), 60)), rng.normal(size=60)


def observe(n, d, loss):
  names = ('params', 'tokens', 'loss')
  return rows.observe([dict(zip(names, row, strict=True)) for row in zip(n, d, loss, strict=True)])


MADE = {
  'Chinchilla': {'E': 1.7, 'A': 400.0, 'B': 4000.0, 'alpha': 0.34, 'beta': 0.4},
  'TiedChinchilla': {'E': 1.7, 'A': 400.0, 'B': 900.0, 'alpha': 0.34},
  'GammaChinchilla': {'E': 1.2, 'A': 4e4, 'B': 4e5, 'alpha': 0.7, 'beta': 0.7, 'gamma': 0.4},
}


@pytest.mark.parametrize('name', MADE)
def test_the_law_that_made_the_rows_is_not_rejected(name, design):
  n, d, noise = design
  loss = laws.by_name(name)(MADE[name], params=n, tokens=d) * np.exp(0.002 * noise)
  found = {c.law: c for c in comparison.compare(observe(n, d, loss))}
  best = min(c.aicc for c in found.values())
  assert found[name].aicc - best < 4
  assert found[name].rms == pytest.approx(0.002, rel=0.25)
  assert sum(c.weight for c in found.values()) == pytest.approx(1)
  if name == 'GammaChinchilla':
    assert found['Chinchilla'].aicc - best > 10
  if name == 'Chinchilla':
    assert found['TiedChinchilla'].aicc - best > 10


def test_known_differences_of_the_replications_rows(shared_data):
  """As `diagnostics.compare` has them with the solver (-1988.4, -1983.5, -1934.6; slow test below)."""
  seen = rows.observe(tables.read(shared_data / 'chinchilla_fig4.csv').rows)
  told = comparison.sentence(comparison.compare(seen))
  assert told.startswith(
    'AICc is lowest for GammaChinchilla (1.7% rms), not clearly: Chinchilla +4.9 (1.7% rms), '
    'TiedChinchilla +53.7'
  )


@pytest.mark.slow
def test_the_comparison_is_that_of_the_solver(shared_data):
  seen = rows.observe(tables.read(shared_data / 'misfitting_best.csv').rows)
  ours = {c.law: c.aicc for c in comparison.compare(seen)}
  law = [laws.by_name(name) for name in ours]
  for line in diagnostics.compare(law, seen.inputs, seen.loss):
    assert ours[line['law']] == pytest.approx(line['aicc'], abs=0.01)


def test_a_misfit_is_told_along_its_axis(design):
  n, d, noise = design
  seen = observe(n, d, np.full(60, 3.0))
  bend = np.log(n / np.sqrt(n.min() * n.max())) ** 2
  told = comparison.describe(comparison.misfit(seen, 0.001 * noise + 0.02 * bend / bend.max()))
  assert told.startswith('the law misses a trend along N: it lies')
  assert comparison.misfit(seen, 0.003 * noise) is None
  assert (
    comparison.misfit(seen, 1e-5 * noise + 2e-4 * bend / bend.max()) is None
  )  # too small to matter


def test_few_rows_compare_nothing(design):
  n, d, _ = design
  seen = observe(n[:6], d[:6], 1.7 + 400 / n[:6] ** 0.34 + 410 / d[:6] ** 0.28)
  assert comparison.sentence(comparison.compare(seen)) is None
