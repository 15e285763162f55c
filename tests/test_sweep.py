"""A sweep: its plan, its workers, and a forecast that is registered before it is tested."""

import fcntl
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

from research import configs, sweep
from research.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAW = {'A': 60.0, 'B': 180.0, 'E': 1.1, 'alpha': 0.30, 'beta': 0.34}

SWEEP = """
from __gin__ import dynamic_registration
from research import sweep
from research.scaling import designs
SWEEP = @sweep.Sweep
sweep.Sweep:
  run = 'tests/gin/decoder.gin'
  design = @designs.IsoFlop()
  forecast = 3.0
  bindings = ("FILES='{files}'", 'Run.checkpoint_every=None')
designs.IsoFlop:
  budgets = {budgets}
  sizes = {sizes}
  min_steps = {min_steps}
  ladder = @designs.Ladder()
  learning_rate = @learning_rate/designs.Rule()
  batch_size = @batch_size/designs.Rule()
designs.Ladder:
  widths = {widths}
  head_dim = 8
learning_rate/designs.Rule.value = 0.01
batch_size/designs.Rule.value = 8
"""


@pytest.fixture
def make(tmp_path, text_file):
  def make(budgets=(4e10, 8e10, 1.6e11), sizes=5, widths=(8, 128, 8), min_steps=10) -> str:
    path = tmp_path / 'sweep.gin'
    path.write_text(
      SWEEP.format(
        files=text_file, budgets=budgets, sizes=sizes, widths=widths, min_steps=min_steps
      )
    )
    return str(path)

  return make


@pytest.fixture
def trained(monkeypatch):
  """Training by formula: the loss is a known law of N and D, at once."""
  from research import train

  done = []

  def fake(run, workdir, text, stream):
    from research.model import counts

    c = counts.count(run.model, run.train.lengths)
    tokens = run.steps * run.batch_size * run.target_length
    n = c.params_with_head
    loss = LAW['E'] + LAW['A'] / n ** LAW['alpha'] + LAW['B'] / tokens ** LAW['beta']
    done.append(workdir.name)
    row = {
      'status': 'finished', 'loss': loss, 'tokens': tokens, 'seconds': 1.0,
      'params_with_head': n, 'params_non_embedding': c.params_non_embedding, 'params_total': c.params_total,
      'flops_6n_with_head': c.flops_6n_with_head * tokens,
      'flops_6n_non_embedding': c.flops_6n_non_embedding * tokens,
    }  # fmt: skip
    (workdir / 'run.json').write_text(json.dumps(row))
    return row

  monkeypatch.setattr(train, 'train', fake)
  return done


def build(file):
  return configs.load(file, root='SWEEP').build()


def test_the_law_is_found_and_its_forecast_comes_before_the_run(make, trained, tmp_path):
  the_sweep = build(make())
  rungs, runs, base = sweep.make_plan(the_sweep)
  folder = sweep.Folder(tmp_path)
  folder.register(runs)
  sweep.work(the_sweep, folder.plan(), folder)
  assert sorted(trained) == sorted(run.name for run in runs)
  rows, analysis = sweep.fit(folder, the_sweep, runs)
  forecast = sweep.register_forecast(the_sweep, analysis, rungs, base.target_length, folder)
  assert (tmp_path / 'forecast.json').exists()
  assert forecast['run'] not in trained
  sweep.work(the_sweep, folder.plan(), folder)
  assert trained[-1] == forecast['run']
  outcome = next(row for row in folder.rows(folder.plan()) if row['role'] == 'forecast')
  assert abs(forecast['forecast']['loss'] / outcome['loss'] - 1) < 0.002
  # A forecast is never made twice, and its run never takes part in the fit.
  before = (tmp_path / 'forecast.json').read_bytes()
  assert sweep.register_forecast(the_sweep, None, rungs, base.target_length, folder) == forecast
  assert (tmp_path / 'forecast.json').read_bytes() == before
  again, analysis2 = sweep.fit(folder, the_sweep, folder.plan())
  assert len(again) == len(rows) + 1
  page = sweep.report(folder, the_sweep, again, analysis2, forecast, folder.plan()).read_text()
  assert f'{outcome["loss"]:.4f}' in page
  assert forecast['registered'] in page
  assert analysis2.forecast(1e12).loss == analysis.forecast(1e12).loss


def test_finished_runs_are_not_done_again_and_a_held_one_is_left_alone(make, trained, tmp_path):
  the_sweep = build(make())
  _, runs, _ = sweep.make_plan(the_sweep)
  folder = sweep.Folder(tmp_path)
  assert sweep.do_run(the_sweep, runs[0], folder)
  assert not sweep.do_run(the_sweep, runs[0], folder)
  workdir = folder.run(runs[1])
  workdir.mkdir(parents=True)
  with (workdir / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert not sweep.do_run(the_sweep, runs[1], folder)
  assert sweep.do_run(the_sweep, runs[1], folder)
  assert trained == [runs[0].name, runs[1].name]


def test_a_failed_run_is_a_row_with_its_reason_and_the_rest_goes_on(
  make, trained, tmp_path, monkeypatch
):
  from research import train

  the_sweep = build(make())
  _, runs, _ = sweep.make_plan(the_sweep)
  folder, fake = sweep.Folder(tmp_path), train.train

  def fails_once(run, workdir, text, stream):
    if workdir.name == runs[2].name:
      raise RuntimeError('out of cheese\nRedo from start')
    return fake(run, workdir, text, stream)

  monkeypatch.setattr(train, 'train', fails_once)
  sweep.work(the_sweep, runs, folder)
  row = folder.row(runs[2])
  assert (row['status'], row['reason']) == ('failed', 'RuntimeError: out of cheese')
  assert 'out of cheese' in (folder.run(runs[2]) / 'log.txt').read_text()
  assert len(folder.rows(runs)) == len(runs)
  _, analysis = sweep.fit(folder, the_sweep, runs)
  assert len(analysis.rows) == len(runs) - 1


def test_a_plan_is_the_same_when_read_back(make, tmp_path):
  the_sweep = build(make())
  _, runs, _ = sweep.make_plan(the_sweep)
  folder = sweep.Folder(tmp_path)
  folder.register(runs)
  assert folder.plan() == runs
  folder.register(runs[:2])
  assert folder.plan() == runs
  other = types.SimpleNamespace(**vars(runs[0])) and runs[0].__class__(
    **{**vars(runs[0]), 'learning_rate': 1.0}
  )
  with pytest.raises(UserError, match=re.escape(f'in which {runs[0].name} is another run')):
    folder.register([other])


def test_a_sweep_that_would_repeat_its_data_is_refused():
  with pytest.raises(
    UserError,
    match=r'needs 1e\+?0?6 tokens|needs 1M tokens .* raise train/Stream\.examples to 7813',
  ):
    sweep.check_data(
      types.SimpleNamespace(target_length=128), range(100), 1_000_000, 'the forecast run'
    )


def test_what_is_wrong_with_a_sweep_is_told_by_the_command(make):
  command = [sys.executable, '-m', 'research.sweep', f'--gin_file={make()}', '--plan']
  done = subprocess.run(
    [*command, '--gin.Sweep.forecast=0.5'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(
    'error: --gin.Sweep.forecast=0.5: Sweep.forecast: 0.5 must be'
  )
