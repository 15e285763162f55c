"""The studies of transfer, LoRA, distillation and emergence, in their tiny versions."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(study: str, workdir: pathlib.Path, environment: dict[str, str]) -> str:
  """What a tiny study prints."""
  command = [
    sys.executable, f'experiments/{study}/study.py', '--quick', f'--workdir={workdir}', '--workers=2'
  ]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize('study', ['transfer', 'lora', 'distillation', 'emergence'])
def test_study_registers_before_it_tests_and_goes_on(study, tmp_path, user_environment):
  first = run(study, tmp_path, user_environment)
  assert 'failed' not in first
  assert 'left out' not in first
  registered = (tmp_path / 'forecast.json').stat().st_mtime
  with (tmp_path / 'results.csv').open() as table:
    rows = list(csv.DictReader(table))
  stages = {row['run']: row['stage'] for row in rows}
  assert set(stages.values()) >= {'fit', 'test'}
  starts = {
    name: (tmp_path / 'runs' / name / 'config.gin').stat().st_mtime
    for name, stage in stages.items()
    if stage
  }
  later = ('test', 'again')
  assert all((starts[name] > registered) == (stages[name] in later) for name in starts)
  outcome = json.loads((tmp_path / 'outcome.json').read_text())
  forecast = json.loads((tmp_path / 'forecast.json').read_text())
  assert set(forecast['forecasts']) == set(outcome) - {'registered'}
  assert all(outcome[name]['measured'] for name in forecast['forecasts'])
  assert (tmp_path / f'{study}.png').stat().st_size > 10_000
  # A run that was lost is trained again, and no other one; the forecast stays.
  lost = next(name for name, stage in stages.items() if stage == 'test')
  (tmp_path / 'runs' / lost / 'run.json').unlink()
  second = run(study, tmp_path, user_environment)
  assert second.count('are to be trained') == 1
  assert '1 of 1 after' in second
  assert (tmp_path / 'forecast.json').stat().st_mtime == registered
