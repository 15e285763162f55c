"""A sweep whose runs start from others of it, trained for real."""

import csv
import json
import os

import pytest

from research.core import configs
from research.scaling import any_law, laws
from research.scaling.rows import Columns
from research.sweeps import findings, report
from research.sweeps.folder import Folder
from research.sweeps.sweep import check_fresh, make_folder, make_plan, open_data
from research.sweeps.worker import Worker

SWEEP = """
from __gin__ import dynamic_registration
from research.designs import plan
from research.designs import transfer
from research.sweeps import sweep
SWEEP = @sweep.Sweep
sweep.Sweep:
  run = 'tests/gin/decoder.gin'
  design = @transfer.Transfer()
  forecast = None
  bindings = ("FILES='{before}'", 'Run.checkpoint_every=None')
transfer.Transfer:
  before = ("FILES='{before}'",)
  after = ("FILES='{after}'",)
  params = (4e3, 16e3)
  pretraining = (12800,)
  tuning = (2560, 5120)
  scratch = (2560, 5120, 12800)
  methods = (('gin/tuning/start.gin',), ('gin/tuning/lora.gin', 'RANK=2'))
  min_steps = 10
  ladder = @plan.Ladder()
  learning_rate = @learning_rate/plan.Rule()
  batch_size = @batch_size/plan.Rule()
plan.Ladder:
  widths = (8, 24, 8)
  head_dim = 8
learning_rate/plan.Rule.value = 0.01
batch_size/plan.Rule.value = 8
"""


@pytest.mark.slow
def test_tuned_rows_have_what_their_parents_were(text_file, one_device, tmp_path):
  after = tmp_path / 'after' / '*.txt'
  after.parent.mkdir()
  for path in text_file.parent.glob('*.txt'):
    (after.parent / path.name).write_text(path.read_text().upper())
  file = tmp_path / 'sweep.gin'
  file.write_text(SWEEP.format(before=text_file, after=after))
  config = configs.load(str(file), root='SWEEP')
  the_sweep = config.build()
  _, runs, base = make_plan(the_sweep)
  folder = Folder(tmp_path / 'sweep')
  make_folder(folder, config.text)
  folder.register(runs)
  streams = open_data(the_sweep, runs, base)
  check_fresh(runs, streams, base.target_length)
  assert len({id(stream) for stream in streams.values()}) == 2
  Worker(the_sweep, folder).work(folder.plan(), poll=0.05)
  answer = findings.conclude(folder, the_sweep, runs)
  rows = {row['run']: row for row in folder.rows(runs)}
  assert [row['status'] for row in rows.values()] == ['finished'] * (2 * (1 + 2 * 2 + 3))
  for run in runs:
    row = rows[run.name]
    if run.method:
      parent = rows[run.parent]
      assert row['init/loss'] == parent['loss']
      assert row['init/tokens'] == parent['tokens']
      # Rows count the tokens that were read, which padding is not.
      assert parent['tokens'] == pytest.approx(12800, rel=0.01)
      assert row['init/params_total'] == parent['params_total']
      assert row['tokens'] == pytest.approx(run.tokens, rel=0.01)
      # It reads another text than its parent did, and starts from there.
      assert row['loss'] != parent['loss']
      assert ('params_learned' in row) == ('lora' in run.method)
    else:
      assert 'init/loss' not in row
  # Each parent and each method is told of.
  assert all(run.name in str(answer) for run in runs if run.method)
  report.write(folder, the_sweep, answer)  # which writes the rows again
  with (folder.path / 'results.csv').open() as table:
    written = {row['run']: row for row in csv.DictReader(table)}
  for name, more in answer.columns.items():
    value = more['data_transferred']
    assert written[name]['data_transferred'] == ('' if value is None else str(value))
  # A fit of the table takes the tuned rows alone.
  columns = Columns(inputs={'tuning_data': 'tokens', 'scale': 'init/tokens'})
  names = ('scale', 'tuning_data', 'loss')
  values = any_law.read(list(written.values()), names, laws.MultiplicativeTuning(), columns, 'fit')
  tuned = [rows[run.name] for run in runs if run.method]
  assert sorted(values['tuning_data']) == sorted(row['tokens'] for row in tuned)
  assert sorted(values['tuning_data']) == pytest.approx([2560] * 4 + [5120] * 4, rel=0.02)
  assert set(values['scale']) == {row['init/tokens'] for row in tuned}
  # Started again it does nothing.
  before = {path: os.path.getmtime(path) for path in folder.path.rglob('run.json')}
  Worker(the_sweep, folder).work(folder.plan(), poll=0.05)
  assert before == {path: os.path.getmtime(path) for path in folder.path.rglob('run.json')}
  assert json.loads((folder.path / 'plan.json').read_text())[1]['method'] == 'gin/tuning/start.gin'
