"""experiments/overoptimisation: its gold reward, its estimator of best-of-n, and its tiny version."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = ROOT / 'experiments' / 'overoptimisation'


@pytest.fixture
def parts(monkeypatch):
  """The modules of the study."""
  monkeypatch.syspath_prepend(str(STUDY))
  import best_of
  import gold

  yield gold, best_of
  for name in ('best_of', 'gold'):
    sys.modules.pop(name)


def test_best_of_n_is_the_mean_over_all_subsets(parts):
  _, best_of = parts
  rng = np.random.default_rng(0)
  scores, values = rng.normal(size=(2, 7))
  for n in (1, 2, 4, 7):
    subsets = [list(subset) for subset in itertools.combinations(range(7), n)]
    expected = np.mean([values[subset][scores[subset].argmax()] for subset in subsets])
    assert best_of.best_of_n(scores, values, n) == pytest.approx(expected, abs=1e-12)


def test_gold_is_standard_on_the_chain_and_punishes_repetition(parts):
  gold, _ = parts
  _, values, mean, deviation = gold.tables()
  rewards = np.array([gold.gold(text[gold.PROMPT :]) for text in gold.texts(2_000, 3)])
  assert -1 < rewards.mean() < 0
  assert 0.8 < rewards.std() < 1.5
  best = max(itertools.product(range(8), repeat=2), key=lambda index: values[index])
  repeated = ''.join(gold.LETTERS[number] for number in best) * 12
  numbers = [gold.LETTERS.index(letter) for letter in repeated]
  total = sum(values[tuple(numbers[i : i + 2])] for i in range(23))
  distinct = len(set(itertools.pairwise(repeated)))
  expected = (total - mean) / deviation - 0.5 * (17 - distinct)
  assert gold.gold(repeated) == pytest.approx(expected)


@pytest.mark.slow
def test_the_tiny_study_runs_from_end_to_end(tmp_path):
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'ISOFLOP_CACHE': str(tmp_path / 'cache')}
  command = [sys.executable, str(STUDY / 'study.py'), f'--workdir={tmp_path}', '--quick']
  subprocess.run([*command, '--prepare'], check=True, cwd=ROOT, env=environment)
  subprocess.run([*command, '--workers=2'], check=True, cwd=ROOT, env=environment)
  for group in json.loads((tmp_path / 'samples.json').read_text()):
    assert len(set(group['texts'])) > len(group['texts']) / 2
  registered = json.loads((tmp_path / 'forecast.json').read_text())
  outcome = json.loads((tmp_path / 'outcome.json').read_text())
  assert [row['method'] for row in outcome] == ['best of n', 'reinforcement']
  assert all(row['b_forecast'] >= 0 and row['last_kl'] > 0 for row in outcome)
  # The forecast was written before the runs that test it, and another start changes nothing of it.
  tested = tmp_path / 'policy-16-64' / 'metrics.jsonl'
  assert (tmp_path / 'forecast.json').stat().st_mtime < tested.stat().st_mtime
  again = subprocess.run(
    command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert 'policy, largest proxy: 0 of 1 to run' in again.stdout
  assert json.loads((tmp_path / 'forecast.json').read_text()) == registered
  assert (tmp_path / 'overoptimisation.png').stat().st_size > 10_000
