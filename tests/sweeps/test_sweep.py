"""A sweep: its plan, its workers, and a forecast that is registered before it is tested."""

import dataclasses
import errno
import functools
import html
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import pytest

from research.core import configs
from research.core.errors import Invalid, UserError
from research.model import counts
from research.scaling import laws
from research.sweeps import estimate, findings, report, status
from research.sweeps.folder import Folder
from research.sweeps.forecast import register_forecast
from research.sweeps.sweep import check_fresh, make_folder, make_plan
from research.sweeps.worker import Worker, populations
from research.training import loop, population

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DESIGNS = sorted(path.stem for path in (ROOT / 'gin/sweeps').glob('*.gin'))
LAW = {'A': 60.0, 'B': 180.0, 'E': 1.1, 'alpha': 0.30, 'beta': 0.34}

SWEEP = """
from __gin__ import dynamic_registration
from research.sweeps import sweep
from research.designs import plan
from research.designs import isoflop
SWEEP = @sweep.Sweep
sweep.Sweep:
  run = 'tests/gin/decoder.gin'
  design = @isoflop.IsoFlop()
  forecast = 3.0
  bindings = ("FILES='{files}'", 'Run.checkpoint_every=None')
isoflop.IsoFlop:
  budgets = {budgets}
  sizes = {sizes}
  min_steps = {min_steps}
  ladder = @plan.Ladder()
  learning_rate = @learning_rate/plan.Rule()
  batch_size = @batch_size/plan.Rule()
plan.Ladder:
  widths = {widths}
  head_dim = 8
learning_rate/plan.Rule.value = 0.01
batch_size/plan.Rule.value = 8
"""


def write_sweep(
  folder, files, budgets=(4e10, 8e10, 1.6e11), sizes=5, widths=(8, 128, 8), min_steps=10
) -> str:
  """Writes the gin file of a small sweep over a text; returns its path."""
  path = folder / 'sweep.gin'
  path.write_text(
    SWEEP.format(files=files, budgets=budgets, sizes=sizes, widths=widths, min_steps=min_steps)
  )
  return str(path)


@pytest.fixture
def make(tmp_path, text_file):
  return functools.partial(write_sweep, tmp_path, text_file)


@pytest.fixture(scope='module')
def plan(tmp_path_factory, text_file):
  """(sweep, its sizes, its runs, their base run): planned once, since every size is counted."""
  the_sweep = build(write_sweep(tmp_path_factory.mktemp('plan'), text_file))
  return the_sweep, *make_plan(the_sweep)


@pytest.fixture(scope='module')
def counted():
  """Counts of a run's model, of each model once."""
  known = {}

  def count(run):
    key = repr(run.model), repr(run.train.lengths)
    if key not in known:
      known[key] = counts.count(run.model, run.train.lengths)
    return known[key]

  return count


@pytest.fixture
def trained(monkeypatch, counted):
  """Training by formula: the loss is a known law of N and D, at once."""
  done = []

  def fake(run, workdir, text, stream):
    count = counted(run)
    tokens = run.steps * run.batch_size * run.target_length
    n = count.params_with_head
    loss = LAW['E'] + LAW['A'] / n ** LAW['alpha'] + LAW['B'] / tokens ** LAW['beta']
    done.append(workdir.name)
    row = {
      'status': 'finished', 'loss': loss, 'tokens': tokens, 'seconds': 1.0,
      'params_with_head': n, 'params_non_embedding': count.params_non_embedding,
      'params_total': count.params_total,
      'flops_6n_with_head': count.flops_6n_with_head * tokens,
      'flops_6n_non_embedding': count.flops_6n_non_embedding * tokens,
    }  # fmt: skip
    (workdir / 'run.json').write_text(json.dumps(row))
    return row

  monkeypatch.setattr(loop, 'train', fake)
  together = lambda runs, workdirs, texts, streams: [
    fake(*member) for member in zip(runs, workdirs, texts, streams, strict=True)
  ]
  monkeypatch.setattr(population, 'train_population', together)
  return done


@pytest.fixture
def few_replicates(monkeypatch):
  """Intervals of 50 redraws: the rows have no noise, and it is not the intervals that are tested."""
  quick = functools.partial(findings.fit_results, replicates=50)
  monkeypatch.setattr(findings, 'fit_results', quick)


def build(file):
  return configs.load(file, root='SWEEP').build()


def work(the_sweep, folder, runs=None, peers=1):
  Worker(the_sweep, folder, peers).work(folder.plan() if runs is None else runs, poll=0.05)


def test_the_law_is_found_and_its_forecast_comes_before_the_run(
  plan, trained, few_replicates, tmp_path
):
  the_sweep, rungs, runs, base = plan
  folder = Folder(tmp_path)
  folder.register(runs)
  work(the_sweep, folder)
  assert sorted(trained) == sorted(run.name for run in runs)
  analysis = findings.conclude(folder, the_sweep, runs)
  rows = folder.rows(runs)
  law = findings.provisional_law(the_sweep, rows)
  assert re.match(rf'so far, of {len(rows)} runs: N\* ~ C\^a with .*approach 3: 0\.\d+ \[', law)
  forecast = register_forecast(the_sweep, analysis, rungs, base.target_length, folder)
  assert (tmp_path / 'forecast.json').exists()
  assert forecast['runs'][0] not in trained
  work(the_sweep, folder)
  assert [trained[-1]] == forecast['runs']
  outcome = next(row for row in folder.rows(folder.plan()) if row['role'] == 'forecast')
  assert abs(forecast['forecast']['loss'] / outcome['loss'] - 1) < 0.002
  # A forecast is never made twice, and its run never takes part in the fit.
  before = (tmp_path / 'forecast.json').read_bytes()
  assert register_forecast(the_sweep, None, rungs, base.target_length, folder) == forecast
  assert (tmp_path / 'forecast.json').read_bytes() == before
  again = findings.fit(the_sweep, folder.rows(folder.plan()), conventions=False)
  assert again.forecast(1e12).loss == analysis.forecast(1e12).loss
  page = report.write(folder, the_sweep, analysis, forecast).read_text()
  assert f'{outcome["loss"]:.4f}' in page
  assert forecast['registered'] in page
  assert (tmp_path / 'results.csv').read_text().count('\n') == 1 + len(rows) + 1


def test_what_is_known_of_the_law_is_held(plan, trained, few_replicates, tmp_path):
  the_sweep, _, runs, _ = plan
  the_sweep = dataclasses.replace(the_sweep, fixed={'E': LAW['E']})
  work(the_sweep, Folder(tmp_path), runs)
  found = findings.conclude(Folder(tmp_path), the_sweep, runs)
  assert found.approach3.parameters['E'] == found.approach2.loss.floor == LAW['E']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'law': laws.Kaplan}, r'Sweep\.law: .* is no law: bind an instance'),
    (
      {'law': laws.DataConstrained()},
      r'Sweep\.law: DataConstrained is a law of params, tokens, uniq',
    ),
    ({'fixed': {'e': 1.0}}, r"Sweep\.fixed: Chinchilla has no 'e'; it has E, A, B"),
    ({'fixed': {'E': -1.0}}, r'Sweep\.fixed: E must be 0 or more'),
    ({'fixed': {'alpha': 0}}, r'Sweep\.fixed: alpha must be above 0, as an exponent'),
    ({'fixed': {'E': 'x'}}, r'Sweep\.fixed: E must be a finite number'),
    ({'prior': {'E': 1.0}}, r'Sweep\.prior: Chinchilla also needs A, B, alpha, beta'),
    ({'law': laws.TiedChinchilla(), 'fixed': {'beta': 1.0}}, r"TiedChinchilla has no 'beta'"),
  ],
)
def test_a_law_that_a_sweep_cannot_fit_is_refused_at_once(change, message, plan):
  with pytest.raises(Invalid, match=message):
    dataclasses.replace(plan[0], **change)


def test_the_law_of_a_sweep_is_what_its_plan_and_its_rows_are_fitted_to(plan, monkeypatch):
  prior, law = {'E': 1.2, 'A': 60.0, 'B': 60.0, 'alpha': 0.3}, laws.TiedChinchilla()
  the_sweep, _, runs, _ = plan
  the_sweep = dataclasses.replace(the_sweep, law=law, prior=prior, noise=0.0)
  asked = []

  def fit_results(rows, **options):
    asked.append((rows, options))
    return types.SimpleNamespace(exponents=lambda: {'a, approach 3': (0.5, 0.4, 0.6)})

  monkeypatch.setattr(findings, 'fit_results', fit_results)
  monkeypatch.setattr(estimate, 'fit_results', fit_results)
  said = estimate.informative(the_sweep, runs, draws=1)
  assert said.startswith(
    'if the law were TiedChinchilla with E 1.2, A 60, B 60, alpha 0.3, and seeds'
  )
  ((rows, options),) = asked
  expected = [1.2 + 60 / run.size.params**0.3 + 60 / run.tokens**0.3 for run in runs]
  assert [row['loss'] for row in rows] == pytest.approx(expected, rel=1e-12)
  findings.fit(the_sweep, rows)
  assert options['law'] == asked[1][1]['law'] == law


def test_finished_runs_are_not_done_again_and_a_held_one_is_left_alone(plan, trained, tmp_path):
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  worker, other = Worker(the_sweep, folder), Worker(the_sweep, folder)
  assert worker.do(runs[0])
  assert not worker.do(runs[0])
  held = other.leases.take(runs[1].name)
  assert not worker.do(runs[1])
  held.release()
  assert worker.do(runs[1])
  assert trained == [runs[0].name, runs[1].name]


def test_a_failed_run_is_tried_again_then_a_row_with_its_reason_and_the_rest_goes_on(
  plan, trained, tmp_path, monkeypatch
):
  the_sweep, _, runs, _ = plan
  folder, fake = Folder(tmp_path), loop.train

  tried = []

  def fails(run, workdir, text, stream):
    tried.append(workdir.name)
    if workdir.name == runs[2].name or (
      workdir.name == runs[3].name and tried.count(runs[3].name) < 3
    ):
      raise RuntimeError('out of cheese\nRedo from start')
    return fake(run, workdir, text, stream)

  monkeypatch.setattr(loop, 'train', fails)
  work(the_sweep, folder, runs)
  row = folder.row(runs[2])
  assert (row['status'], row['reason']) == ('failed', 'RuntimeError: out of cheese (3 attempts)')
  assert folder.row(runs[3])['status'] == 'finished'
  assert (tried.count(runs[2].name), tried.count(runs[3].name)) == (3, 3)
  assert 'out of cheese' in (folder.run(runs[2]) / 'log.txt').read_text()
  assert len(folder.rows(runs)) == len(runs)
  analysis = findings.conclude(folder, the_sweep, runs)
  assert len(analysis.rows) == len(runs) - 1


def test_a_full_disk_is_tried_again_and_a_wrong_input_is_not(plan, trained, tmp_path, monkeypatch):
  the_sweep, _, runs, _ = plan
  folder, fake = Folder(tmp_path), loop.train
  tried = []

  def fails(run, workdir, text, stream):
    tried.append(workdir.name)
    if workdir.name == runs[2].name and tried.count(runs[2].name) < 3:
      full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'array')
      raise UserError('the disk has no room for a checkpoint') from full
    if workdir.name == runs[3].name:
      raise UserError('no such file')
    return fake(run, workdir, text, stream)

  monkeypatch.setattr(loop, 'train', fails)
  work(the_sweep, folder, runs)
  assert folder.row(runs[2])['status'] == 'finished'
  assert tried.count(runs[2].name) == 3
  row = folder.row(runs[3])
  assert (row['status'], row['reason']) == ('failed', 'no such file')
  assert tried.count(runs[3].name) == 1


def test_a_run_whose_worker_vanishes_again_and_again_is_given_up(plan, trained, tmp_path):
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  gone = subprocess.Popen(['true'])
  gone.wait()
  for attempt in range(the_sweep.retries + 1):
    worker = Worker(the_sweep, folder)
    with pytest.MonkeyPatch.context() as patch:  # the lease of a process that is no more
      patch.setattr('os.getpid', lambda: gone.pid)
      held = worker.leases.take(runs[0].name)
    assert held.failures == attempt
  work(the_sweep, folder, runs[:2])
  assert folder.row(runs[0])['status'] == 'failed'
  assert re.search(r'vanished or hung \(3 attempts\)', folder.row(runs[0])['reason'])
  assert folder.row(runs[1])['status'] == 'finished'


def test_a_mistake_in_a_run_is_not_tried_again(plan, trained, tmp_path, monkeypatch):
  def wrong(run, workdir, text, stream):
    tried.append(workdir.name)
    raise UserError('the vocabulary is too small.')

  tried = []
  monkeypatch.setattr(loop, 'train', wrong)
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  work(the_sweep, folder, runs[:1])
  assert folder.row(runs[0])['reason'] == 'the vocabulary is too small.'
  assert tried == [runs[0].name]


def test_a_mistake_in_one_member_is_not_the_others(plan, trained, tmp_path, monkeypatch):
  fake = loop.train

  def wrong(run, workdir, text, stream):
    if workdir.name == 'rate-1':
      raise UserError('rate-1 is wrong.')
    return fake(run, workdir, text, stream)

  def together(runs, workdirs, texts, streams):
    raise UserError('rate-1 is wrong.')

  monkeypatch.setattr(population, 'train_population', together)
  monkeypatch.setattr(loop, 'train', wrong)
  the_sweep, _, runs, _ = plan
  rates = [dataclasses.replace(runs[0], name=f'rate-{i}', learning_rate=0.01 * i) for i in (1, 2)]
  folder = Folder(tmp_path)
  work(the_sweep, folder, rates)
  assert [folder.row(run)['status'] for run in rates] == ['failed', 'finished']


def test_runs_of_one_shape_are_trained_together(plan, trained, tmp_path, monkeypatch):
  groups, together = [], population.train_population

  def note(runs, workdirs, texts, streams):
    groups.append([workdir.name for workdir in workdirs])
    return together(runs, workdirs, texts, streams)

  monkeypatch.setattr(population, 'train_population', note)
  the_sweep, _, runs, _ = plan
  rates = [
    dataclasses.replace(runs[0], name=f'rate-{i}', learning_rate=0.001 * (i + 1), settings=settings)
    for i, settings in enumerate(
      [(), ('Run.seed=1',), (), ('Run.clip=0.5',), (), ('adamw.weight_decay=0.0',)]
    )
  ]
  work(the_sweep, Folder(tmp_path / 'a'), rates)
  assert groups == [['rate-0', 'rate-1', 'rate-2', 'rate-4', 'rate-5']]
  assert sorted(trained) == [run.name for run in rates]
  groups.clear()
  work(the_sweep, Folder(tmp_path / 'b'), rates, peers=3)  # a share for each
  assert [len(group) for group in groups] == [2, 2]


def test_how_many_populations_runs_make(plan):
  the_sweep, _, (first, *_), _ = plan
  the_sweep = dataclasses.replace(the_sweep, population=3)
  seeds = [dataclasses.replace(first, name=f'seed-{i}') for i in range(7)]
  longer = dataclasses.replace(first, name='longer', steps=2 * first.steps)
  branches = [dataclasses.replace(first, name=f'b{i}', parent='longer') for i in range(2)]
  assert populations(the_sweep, [*seeds, longer, *branches]) == [3, 3, 1, 1, 1, 1]


def test_runs_of_one_shape_are_divided_only_where_others_would_wait(plan, tmp_path, monkeypatch):
  sizes = []

  def note(runs, workdirs, texts, streams):
    sizes.append(len(runs))
    for workdir in workdirs:
      (workdir / 'run.json').write_text('{"status": "finished"}')

  monkeypatch.setattr(population, 'train_population', note)
  monkeypatch.setattr(
    loop, 'train', lambda run, workdir, text, stream: note([run], [workdir], 0, 0)
  )
  the_sweep, _, runs, _ = plan
  alike = [
    dataclasses.replace(
      runs[0], name=f'{n}-{seed}', steps=n, tokens=n, settings=(f'Run.seed={seed}',)
    )
    for n in (12, 11, 10, 9)
    for seed in range(4)
  ]
  # Two shapes whole; of the last ones a share, and then of what is left, which here nobody else takes.
  work(the_sweep, Folder(tmp_path), alike, peers=2)
  assert sizes == [4, 4, 2, 1, 1, 2, 1, 1]


def test_a_branch_starts_from_its_trunk(plan, trained, tmp_path):
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  trunk = dataclasses.replace(runs[0], name='trunk', role='trunk')
  branch = dataclasses.replace(runs[0], name='branch', parent='trunk', fork=5)
  worker = Worker(the_sweep, folder)
  assert not worker.do(branch)
  saved = folder.run(trunk) / 'checkpoints' / '5'
  saved.mkdir(parents=True)
  (saved / 'state').write_text('parameters')
  (folder.run(trunk) / 'metrics.jsonl').write_text(
    ''.join(json.dumps({'step': step, 'loss': 1.0}) + '\n' for step in (2, 4, 6))
  )
  assert worker.do(branch)
  assert (folder.run(branch) / 'checkpoints' / '5' / 'state').read_text() == 'parameters'
  assert [row['step'] for row in folder.curve(branch)] == [2, 4]
  assert branch.cost == pytest.approx(branch.flops * (1 - 5 / branch.steps))
  folder.fail(trunk, 'out of cheese')
  late = dataclasses.replace(branch, name='late', fork=10)
  worker.work([late])
  assert (
    folder.row(late)['reason'] == 'it starts from step 10 of trunk, which failed: out of cheese'
  )


def test_a_tuned_run_starts_from_the_end_of_its_parent(plan, trained, tmp_path, monkeypatch):
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  parent = dataclasses.replace(runs[0], name='parent', role='parent')
  tuned = dataclasses.replace(
    runs[0], name='tuned', parent='parent', method='gin/tuning/start.gin', settings=('Run.seed=1',)
  )
  saved = folder.run(parent) / 'checkpoints' / str(parent.steps)
  saved.mkdir(parents=True)
  worker = Worker(the_sweep, folder)
  assert not worker.do(tuned)  # its parent has a checkpoint and is not over
  starts, train = [], loop.train

  def note(run, workdir, text, stream):
    starts.append(run.init and run.init.folder)
    return train(run, workdir, text, stream=stream)

  monkeypatch.setattr(loop, 'train', note)
  worker.work([tuned, parent])
  assert trained == ['parent', 'tuned']
  assert starts == [None, str(folder.run(parent))]
  assert tuned.cost == tuned.flops
  # The row of a parent whose loss was not finite has no reason.
  (folder.run(parent) / 'run.json').write_text('{"status": "nan", "loss": null}')
  late = dataclasses.replace(tuned, name='late')
  other = Folder(tmp_path)
  Worker(the_sweep, other).work([late])
  assert (
    other.row(late)['reason']
    == 'it starts from the end of parent, which failed: its loss was not finite'
  )


@pytest.mark.slow
def test_the_scheduler_costs_less_than_a_millisecond_a_run(plan, tmp_path, monkeypatch):
  """Ten thousand runs whose training is nothing: leases, rows and looking for the next run are what is left."""
  the_sweep, _, runs, _ = plan
  n = 10_000
  many = [dataclasses.replace(runs[0], name=f'run-{i}', steps=100 + i) for i in range(n)]
  folder = Folder(tmp_path)
  folder.register(many)
  spent = 0.0

  def nothing(worker, members):
    nonlocal spent
    began = time.process_time()
    for run, _ in members:
      folder.run(run).mkdir(parents=True, exist_ok=True)
      (folder.run(run) / 'run.json').write_text(
        '{"status": "finished", "loss": 1.0, "seconds": 0.1}'
      )
    spent += time.process_time() - began

  monkeypatch.setattr(Worker, 'attempt', nothing)
  plan, table = folder.plan(), status.Table(folder, stream=io.StringIO())
  worker = Worker(the_sweep, folder)
  worker.work(plan[:500])  # warm
  resident = lambda: int(
    re.search(r'VmRSS:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1]
  )
  before, spent, began = resident(), 0.0, time.process_time()
  worker.work(plan)
  for _ in range(3):
    table(plan)
  cost = time.process_time() - began - spent
  assert len(folder.rows(plan)) == n
  assert cost / n < 1e-3
  assert resident() - before < 30_000  # kB: three a run, its row


GIN = """
from __gin__ import dynamic_registration
from research.model import models
include 'tests/gin/{base}.gin'
{more}
"""


@pytest.mark.parametrize(
  ('base', 'model', 'taken'),
  [
    ('decoder', 'mamba', ['EMBED', 'LAYERS']),
    ('encoder_decoder', 't5', ['EMBED', 'LAYERS', 'HEADS', 'HEAD_DIM', 'MLP']),
  ],
)
def test_a_ladder_sets_what_the_model_takes(base, model, taken, make, tmp_path):
  text = (ROOT / f'tests/gin/{base}.gin').read_text()
  (tmp_path / 'run.gin').write_text(text.replace('gin/models/llama/', f'gin/models/{model}/'))
  bindings = [f"Sweep.run='{tmp_path / 'run.gin'}'", 'IsoFlop.sizes=3', 'IsoFlop.spread=3.0']
  bindings += ['IsoFlop.budgets=(5e11,)', 'IsoFlop.min_steps=1']
  file = make(widths=(16, 64, 16))
  rungs, runs, _ = make_plan(configs.load(file, bindings, root='SWEEP').build())
  assert all(list(size.macros) == taken for size in rungs)
  assert len({size.params for size in rungs}) == 4
  assert len(runs) == 3


def test_a_ladder_needs_width_and_depth(make, tmp_path):
  fixed = 'models.LanguageModel.embed = 32'
  (tmp_path / 'run.gin').write_text(GIN.format(base='decoder', more=fixed))
  config = configs.load(make(), [f"Sweep.run='{tmp_path / 'run.gin'}'"], root='SWEEP')
  with pytest.raises(
    UserError, match=r'run\.gin: nothing in it takes the macro EMBED, and a ladder'
  ):
    make_plan(config.build())


def test_status_says_how_far_the_runs_are(plan, trained, tmp_path, capsys):
  the_sweep, _, runs, _ = plan
  folder = Folder(tmp_path)
  with pytest.raises(UserError, match=r'holds no sweep'):
    status.show_status(the_sweep, folder)
  folder.register(runs)
  work(the_sweep, folder, runs[:2])
  folder.fail(runs[2], 'out of cheese')
  folder.run(runs[3]).mkdir(parents=True)
  row = {'step': runs[3].steps // 2, 'loss': 5.25, 'tokens_per_second': runs[3].tokens / 100}
  (folder.run(runs[3]) / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  status.show_status(the_sweep, folder)
  said = capsys.readouterr().out
  assert re.search(rf'{runs[2].name} +failed +out of cheese', said)
  assert re.search(rf'{runs[3].name} +running +5.2500 +50%, 0:50 left', said)
  assert f'2 finished, 1 failed, 1 running, {len(runs) - 4} waiting' in said
  assert re.search(r'no law of 2 runs yet: \w+', said)


def test_a_plan_is_the_same_when_read_back(plan, tmp_path):
  _, _, runs, _ = plan
  folder = Folder(tmp_path)
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
  runs = [
    types.SimpleNamespace(name=name, settings=settings, tokens=tokens)
    for name, settings, tokens in (
      ('short', (), 12_800), ('long', ('FILES=1',), 1_000_000), ('longer', ('FILES=2',), 2_000_000)
    )
  ]  # fmt: skip
  streams = {(): range(100), ('FILES=1',): range(10_000), ('FILES=2',): range(20_000)}
  check_fresh(runs, streams, 128)
  streams['FILES=1',] = range(100)  # enough for the short run, which reads another stream
  with pytest.raises(
    UserError, match=r'long needs 1M tokens .* raise train/Stream\.examples to 7813'
  ):
    check_fresh(runs, streams, 128)


@pytest.mark.parametrize('name', DESIGNS)
def test_every_sweep_of_the_project_can_be_planned(name, capsys):
  the_sweep = build(f'gin/sweeps/{name}.gin')
  _, runs, _ = make_plan(the_sweep)
  status.show_plan(the_sweep, runs)
  said = capsys.readouterr().out
  assert all(run.name in said for run in runs)
  assert f'{len(runs)} runs, ' in said
  assert sum(run.cost for run in runs) < 1e13  # minutes on a laptop


def test_what_is_wrong_with_a_sweep_is_told_by_the_command(make):
  command = [sys.executable, '-m', 'research.sweep', f'--gin_file={make()}', '--plan']
  done = subprocess.run(
    [*command, '--gin.Sweep.forecast=0.5'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(
    'error: --gin.Sweep.forecast=0.5: Sweep.forecast: 0.5 must be'
  )


def test_the_speed_of_a_compiled_step_is_what_was_predicted():
  path = ROOT / 'experiments' / 'tpu_fit' / 'results' / 'llama2_7b.json'
  told = json.loads(path.read_text())
  speed = estimate.compiled(str(path))
  assert (speed.chips, speed.hardware) == (told['devices'], told['topology'])
  assert speed.flops_per_second * told['predicted_step_s'] == pytest.approx(told['model_flops'])


# What a sweep of each design ends in. Sizes are counted by a formula and training is one too.


def formula(macros: dict) -> types.SimpleNamespace:
  n = 12 * macros['LAYERS'] * macros['EMBED'] ** 2 + 264 * macros['EMBED']
  params = dict.fromkeys(['params_with_head', 'params_total', 'params_non_embedding'], n)
  return types.SimpleNamespace(**params, flops_6n_with_head=6.0 * n, flops_6n_non_embedding=6.0 * n)


def loss_of(run, unique: float) -> float:
  """Muennighoff's law, with a rate that is best at twice the rule's, and what an ablation may change."""
  law = laws.DataConstrained()
  values = {
    'params': run.size.params,
    'tokens': run.tokens,
    'unique_tokens': min(unique, run.tokens),
  }
  loss = float(law({**LAW, 'A': 32.0, 'R_D': 6.0, 'R_N': 5.0}, **values))
  best = 0.016 * (run.size.params / 1e5) ** -0.3333
  loss += 0.01 * math.log(run.learning_rate / best) ** 2
  return loss + 0.03 * ('Run.clip=None' in run.settings)


def simulate(name: str, path: pathlib.Path, failed: int):
  """(sweep, folder, runs) of a sweep of the project's whose runs are over, the last `failed` with no result."""
  config = configs.load(f'gin/sweeps/{name}.gin', root='SWEEP')
  the_sweep, folder = config.build(), Folder(path)
  runs = the_sweep.design.plan(the_sweep.design.rungs(formula), 128)
  make_folder(folder, config.text)
  folder.register(runs)
  for run in runs[len(runs) - failed :]:
    folder.fail(run, 'RuntimeError: out of cheese')
  for run in runs[: len(runs) - failed]:
    folder.run(run).mkdir(parents=True)
    examples = [int(s.partition('=')[2]) for s in run.settings if 'examples' in s]
    unique = 128 * (examples or [100_000])[0]
    row = {
      'status': 'finished', 'loss': loss_of(run, unique), 'tokens': run.tokens, 'seconds': 2.0,
      'devices': 1, 'epochs': run.tokens / unique,
      **{k: v for k, v in vars(formula(run.size.macros)).items() if k.startswith('params')},
      'flops_6n_with_head': run.flops, 'flops_6n_non_embedding': run.flops,
    }  # fmt: skip
    (folder.run(run) / 'run.json').write_text(json.dumps(row))
    curve = [{'step': s, 'tokens': s * run.tokens / 4, 'loss': 9.0 / s} for s in (1, 2, 4)]
    lines = ''.join(json.dumps(row) + '\n' for row in curve)
    (folder.run(run) / 'metrics.jsonl').write_text(lines)
  return the_sweep, folder, runs


@pytest.mark.parametrize(
  ('name', 'figures', 'says'),
  [
    ('ablation', 'ablation', r'24x2 Run\.clip=None: .* \(\+0\.0300\)'),
    ('learning_rate', 'rates', r'exponent = -0\.33'),
    ('width_depth', 'shapes', r'best: \d+ wide'),
    pytest.param(
      'horizons', 'sizes surface allocation', r'a, approach 1 +0\.\d+', marks=pytest.mark.slow
    ),
    pytest.param(
      'branches', 'sizes surface allocation', r'Approach 3, \w+: L = ', marks=pytest.mark.slow
    ),
    pytest.param(
      'kaplan', 'sizes isoflop surface allocation', r'a, approach 2', marks=pytest.mark.slow
    ),
    pytest.param('repeats', 'epochs', r'after [5-7](\.\d+)? \[', marks=pytest.mark.slow),
  ],
)
def test_a_design_ends_in_rows_an_answer_and_a_page(name, figures, says, tmp_path):
  the_sweep, folder, runs = simulate(name, tmp_path, failed=1)
  found = findings.conclude(folder, the_sweep, runs)
  assert re.search(says, str(found)), found
  page = report.write(folder, the_sweep, found).read_text()
  assert set(figures.split()) == {path.stem for path in tmp_path.glob('*.png')}
  assert page.count('<img ') >= len(figures.split()) + 1  # and the training curves
  for text in (the_sweep.question, 'out of cheese', runs[0].size.name, 'python -m research.sweep'):
    assert text in page
  assert len((tmp_path / 'results.csv').read_text().splitlines()) == 1 + len(runs)
  assert (tmp_path / 'fit.json').exists() == (name not in ('ablation', 'width_depth'))


@pytest.mark.parametrize('done', [0, 3])
def test_a_law_that_is_refused_leaves_rows_and_a_page_that_says_why(done, tmp_path):
  the_sweep, folder, runs = simulate('kaplan', tmp_path, failed=16 - done)
  why = findings.conclude(folder, the_sweep, runs)
  assert isinstance(why, findings.Refused)
  expected = (
    'none of 16 runs finished; the first: Runt' if done == 0 else r'3 rows for \d parameters'
  )
  assert re.search(f'^no law: .*{expected}', str(why))
  page = report.write(folder, the_sweep, why).read_text()
  assert f'No law: {html.escape(why.reason)}' in page
  assert page.count('RuntimeError: out of cheese') >= 2 * (16 - done)  # the reasons, the rows
  assert ('<img ' in page) == (done > 0)
  assert len((tmp_path / 'results.csv').read_text().splitlines()) == 1 + len(runs)
