"""A population is its members' runs, trained together."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest

from research.checkpoints.manager import Checkpoints
from research.core import configs, storage
from research.core.errors import UserError
from research.parallel import mesh
from research.training import alike, loop, over_members, population
from research.training.program import make_program
from research.training.record import Record

MEMBERS = (
  {'LEARNING_RATE': 1e-3},
  {'LEARNING_RATE': 1e-2, 'warmup_cosine.warmup': 0.2, 'adamw.weight_decay': 0.0},
  {'LEARNING_RATE': 3e-3, 'Run.seed': 1, 'CrossEntropy.z_loss': 1e-3},
  {'LEARNING_RATE': 1e30},  # diverges
)


def load(text_file, **more):
  more = {'Run.clip': None, 'Run.steps': 24, **more}
  bindings = [f"FILES='{text_file}'", *(f'{k}={v}' for k, v in more.items())]
  return configs.load('tests/gin/decoder.gin', bindings)


def train_one(config, workdir):
  with open(os.devnull, 'w') as silence:
    return loop.train(config.build(), workdir, config.text, stream=silence)


def train_many(made, folder):
  with open(os.devnull, 'w') as silence:
    return population.train_population(
      [config.build() for config in made],
      [folder / str(i) for i in range(len(made))],
      [config.text for config in made],
      [silence] * len(made),
    )


def last_state(config, workdir):
  run = config.build()
  with jax.set_mesh(jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])):
    checkpoints = Checkpoints(workdir / 'checkpoints')
    step, state, meta = checkpoints.restore(make_program(run).abstract)
    checkpoints.close()
  return step, jax.tree.map(np.asarray, state), meta


@pytest.fixture(scope='module')
def both(text_file, tmp_path_factory):
  """(configs, folder of runs one by one with their rows, folder of the population with its rows)."""
  alone, together = (tmp_path_factory.mktemp(name) for name in ('alone', 'together'))
  made = [load(text_file, **member) for member in MEMBERS]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    rows = [train_one(config, alone / str(i)) for i, config in enumerate(made)]
  # Over eight devices there would be four shares of one member; over two there are two of two.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:2])
    patch.setattr(jax, 'device_count', lambda: 2)
    many = train_many(made, together)
  return made, (alone, rows), (together, many)


@pytest.mark.slow
def test_members_are_the_runs_one_by_one(both):
  _, (alone, rows), (together, many) = both
  for i, (one, member) in enumerate(zip(rows, many, strict=True)):
    same = set(one) - {'seconds', 'devices', 'loss', 'bits_per_byte'}
    assert {k: member[k] for k in same} == {k: one[k] for k in same}
    assert (member['population'], member['devices']) == (4, 2)
    assert member == json.loads((together / str(i) / 'run.json').read_text())
    if one['loss'] is not None:  # 24 steps of Adam: another compiled program rounds differently
      assert member['loss'] == pytest.approx(one['loss'], rel=2e-5)
    curves = [storage.read_rows(folder / str(i) / 'metrics.jsonl') for folder in (alone, together)]
    pick = lambda key, curves=curves: [[r[key] for r in c if key in r] for c in curves]
    assert pick('step')[0] == pick('step')[1]
    assert pick('learning_rate')[0] == pick('learning_rate')[1]
    np.testing.assert_allclose(*pick('loss'), rtol=2e-5)


@pytest.mark.slow
def test_members_at_once_are_members_one_by_one(both, one_device, tmp_path, monkeypatch):
  """As on an accelerator; one of them diverges on the way."""
  made, _, (_, many) = both
  monkeypatch.setattr(over_members, 'goes_one_by_one', lambda: False)
  rows = train_many(made, tmp_path)
  for here, there in zip(rows, many, strict=True):
    same = set(here) - {'seconds', 'devices', 'loss', 'bits_per_byte'}
    assert {k: here[k] for k in same} == {k: there[k] for k in same}
    assert here['loss'] == (there['loss'] and pytest.approx(there['loss'], rel=2e-5))


@pytest.mark.slow
def test_a_member_that_diverges_is_out_and_the_others_go_on(both):
  made, _, (together, many) = both
  assert [row['status'] for row in many] == ['finished'] * 3 + ['nan']
  assert many[3]['loss'] is None
  assert many[3]['steps'] < 24
  saved = [int(p.name) for p in (together / '3' / 'checkpoints').glob('[0-9]*')]
  assert all(step < many[3]['steps'] for step in saved)
  assert last_state(made[0], together / '0')[0] == 24


@pytest.mark.slow
def test_members_end_with_the_parameters_of_the_runs(both):
  made, (alone, _), (together, _) = both
  for i in range(3):
    states = [last_state(made[i], folder / str(i))[1] for folder in (alone, together)]
    assert {int(s['step']) for s in states} == {24}
    for a, b in zip(*(jax.tree.leaves(s['params']) for s in states), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_a_member_is_resumed_alone_and_a_run_in_a_population(both, text_file, one_device, tmp_path):
  """Members that stand at different steps, and one that was begun alone, end as the undisturbed ones did."""
  _, _, (_, many) = both
  stopped = [load(text_file, **member) for member in MEMBERS[:3]]
  log_step = Record.log_step

  def kill(record, step, scalars):
    if (record.workdir.name, step) == ('0', 16):
      raise KeyboardInterrupt
    return log_step(record, step, scalars)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Record, 'log_step', kill)
    with pytest.raises(KeyboardInterrupt):
      train_many(stopped, tmp_path)
  first = tmp_path / '0' / 'checkpoints'
  assert sorted(int(p.name) for p in first.glob('[0-9]*')) == [7, 14]
  (first / '14').rename(tmp_path / 'gone')  # as if it had been killed before that was written
  alone = train_one(stopped[2], tmp_path / '2')
  (tmp_path / '2' / 'run.json').unlink()  # as if killed between its last checkpoint and its row
  with pytest.MonkeyPatch.context() as patch:  # three members in four places
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:2])
    patch.setattr(jax, 'device_count', lambda: 2)
    rows = train_many(stopped, tmp_path)
  for row, whole in zip(rows, many, strict=False):
    assert row['tokens'] == whole['tokens']
    assert row['loss'] == pytest.approx(whole['loss'], rel=2e-5)
  assert rows[2]['loss'] == pytest.approx(many[2]['loss'], rel=2e-5)
  # The same parameters, evaluated by the program of a run and by that of a population: one unit of float32.
  assert rows[2]['loss'] == pytest.approx(alone['loss'], rel=6e-8)


@pytest.mark.slow
def test_two_rates_at_once(text_file, one_device, tmp_path):
  made = [load(text_file, **{**more, 'Run.steps': 9, 'LAYERS': 1}) for more in MEMBERS[::3]]
  rows = train_many(made, tmp_path)
  assert [row['status'] for row in rows] == ['finished', 'nan']
  alone = train_one(made[0], tmp_path / 'alone')
  assert rows[0]['loss'] == pytest.approx(alone['loss'], rel=2e-5)
  assert rows[0]['tokens'] == alone['tokens']
  assert rows[0]['population'] == 2


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [(0, 0), (0, 1)])
def test_a_population_compiles_its_programs_once(seeds, text_file, one_device, tmp_path, compiled):
  """Ahead of its steps: with batches that all members share, and with batches of their own."""
  more = {'Run.steps': 4, 'Run.eval_every': 2}
  train_many([load(text_file, **more, **{'Run.seed': seed}) for seed in seeds], tmp_path)
  assert [compiled(program) for program in ('init', 'step', 'evaluate')] == [1, 1, 1]


def test_runs_of_different_shapes_are_no_population(text_file, tmp_path):
  made = [load(text_file), load(text_file, **{'Run.batch_size': 16})]
  assert alike.shape(made[0].build()) != alike.shape(made[1].build())
  with pytest.raises(UserError, match=r'"batch_size = 8", "batch_size = 16"'):
    train_many(made, tmp_path)
  split = dataclasses.replace(made[0].build(), mesh=mesh.Mesh())
  with pytest.raises(UserError, match=r'uses one device of one process.*unset Run\.mesh'):
    population.train_population([split] * 2, [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())


def test_what_a_shape_leaves_out(text_file):
  shapes = {alike.shape(load(text_file, **member).build()) for member in MEMBERS}
  assert len(shapes) == 1
  others = [{'Run.steps': 25}, {'Run.clip': 1.0}, {'EMBED': 48}, {'adamw.mask': None}]
  for other in others:
    assert alike.shape(load(text_file, **other).build()) not in shapes
  run = load(text_file).build()
  assert isinstance(run.optimizer, functools.partial)
