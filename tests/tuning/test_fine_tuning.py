"""Fine-tuning: a run starts from a checkpoint, and a part of its parameters learns."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from research.checkpoints import streamed
from research.checkpoints.manager import names
from research.checkpoints.pretrained import Pretrained
from research.core import configs, storage
from research.core.errors import UserError
from research.parallel.mesh import Mesh
from research.training import alike, population
from research.training.loop import train
from research.training.program import FROZEN, make_program
from research.tuning.peft import params_of

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SMALL = {'Run.steps': 6, 'Run.checkpoint_every': 3, 'Run.log_every': 1, 'LAYERS': 1, 'RANK': 2}


def load(text_file, base=None, method=None, **more):
  """The configuration of a base run, or of one that fine-tunes it."""
  settings = {**SMALL, **more}
  files = ['tests/gin/decoder.gin']
  if method is not None:
    files.append(f'gin/tuning/{method}.gin')
    settings['BASE'] = repr(str(base))
  if method not in ('lora', 'dora'):
    del settings['RANK']
  lines = [f"FILES='{text_file}'", *(f'{key}={value}' for key, value in settings.items())]
  return configs.load(files, lines)


def run(config, workdir) -> dict:
  with config.explains(), open(os.devnull, 'w') as silence:
    return train(config.build(), workdir, config.text, stream=silence)


def saved(workdir) -> tuple[dict, dict]:
  """(checksums of all parameters of the newest checkpoint, those of its own arrays), by name."""
  params = streamed.Params(workdir)
  return params.checksums(), params._meta()['checksums']


@pytest.fixture(scope='module')
def base(text_file, tmp_path_factory):
  """A trained run, to start from."""
  workdir = tmp_path_factory.mktemp('base')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    run(load(text_file), workdir)
  return workdir


def test_lora_learns_alone_and_resumes_exactly(base, text_file, one_device, tmp_path, caplog):
  config = load(text_file, base, 'lora')
  row = run(config, tmp_path / 'whole')
  # A base is only read, of which Orbax has nothing to warn.
  assert not [record.message for record in caplog.records if record.name == 'absl']
  # The checkpoint has only the parameters that learn; the rest equals the base to the bit.
  all_sums, own_sums = saved(tmp_path / 'whole')
  assert all(name.startswith('params/') or 'base' not in name for name in own_sums)
  assert {name.rpartition('/')[2] for name in own_sums if name.startswith('params/')} == {
    'lora_a', 'lora_b',
  }  # fmt: skip
  base_sums, _ = saved(base)
  assert all_sums['params/embedder/tokens'] == base_sums['params/embedder/tokens']
  query = 'params/stack/sublayers/0/parts/0/query/kernel'
  assert all_sums[f'{query}/base'] == base_sums[query]
  assert row['params_learned'] < row['params_total'] / 4
  assert row['init/loss'] > 0
  # A matrix that does not learn has no gradient: of the 6 FLOPs per parameter and token, 4 to 5 are left.
  per_token = row['flops_6n_with_head'] / row['tokens']
  assert 4 < per_token / row['params_with_head'] < 5
  # Readers of the checkpoint see the whole model.
  tuned = Pretrained(folder=str(tmp_path / 'whole'))
  params = params_of(tuned.model, tuned.checkpoint)
  base_params = params_of(Pretrained(folder=str(base)).model, streamed.Params(base))
  np.testing.assert_array_equal(params['embedder']['tokens'], base_params['embedder']['tokens'])
  # A run that resumes in the middle ends the same.
  shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
  shutil.rmtree(tmp_path / 'parts' / 'checkpoints' / '6')
  run(config, tmp_path / 'parts')
  assert saved(tmp_path / 'parts')[1] == own_sums


def test_the_base_is_part_of_what_a_run_is(base, text_file, one_device, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(base, copy)
  config = load(text_file, copy, 'lora')
  identity = config.build().identity()
  assert load(text_file, base, 'lora').build().identity() == identity
  earlier = load(text_file, copy, 'lora', **{'Checkpoint.step': 3}).build().identity()
  assert earlier != identity
  # A checkpoint refers to its base, so a base that changed is an error.
  run(
    load(text_file, copy, 'lora', **{'Run.steps': 1, 'Run.checkpoint_every': 1}), tmp_path / 'run'
  )
  shutil.rmtree(copy / 'checkpoints' / '6')
  (copy / 'checkpoints' / '3').rename(copy / 'checkpoints' / '6')
  with pytest.raises(UserError, match=r'has only the parameters that learned.*has changed since'):
    streamed.Params(tmp_path / 'run')


def test_what_neither_learns_nor_is_in_the_checkpoint_is_refused(
  base, text_file, one_device, tmp_path
):
  learns = "('.*/lora_a',)"
  config = load(text_file, base, 'lora', **{'Run.learns': learns})
  with pytest.raises(UserError, match=r'lora_b does not learn and is not in the checkpoint'):
    run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()  # so that the corrected command finds no other run there
  for learns, why in (
    ("('.*/lora_c',)", 'matches no parameter'),
    ("('kind:vectors',)", 'Did you mean kind:vector'),
  ):
    with pytest.raises(UserError, match=why):
      run(load(text_file, base, 'lora', **{'Run.learns': learns}), tmp_path / 'run')
  with pytest.raises(UserError, match=r'embedder/tokens is .384, 32. and this model has .400, 32.'):
    run(load(text_file, base, 'start', VOCAB=400), tmp_path / 'run')


def test_a_vocabulary_grows(base, text_file, one_device):
  more = {'VOCAB': 400, 'Checkpoint.resized': "('embedder/tokens', 'head/kernel')"}
  the_run = load(text_file, base, 'start', **more).build()
  with Mesh().use(jax.devices()[:1]):
    program = make_program(the_run)
    initial = jax.jit(program.init)(jax.random.key(0))['params']['embedder']['tokens']
    state = jax.jit(program.init)(jax.random.key(0), program.initial_values())
  tokens = streamed.Params(base).piece(('embedder', 'tokens'), ())
  np.testing.assert_array_equal(state['params']['embedder']['tokens'][:384], tokens)
  np.testing.assert_array_equal(state['params']['embedder']['tokens'][384:], initial[384:])


@pytest.mark.slow
def test_what_does_not_learn_has_no_gradient_and_no_optimizer_state(base, text_file, one_device):
  steps = []
  for method, more in (('start', {}), ('start', {'Run.learns': "('kind:vector',)"})):
    tuned = load(text_file, base, method, **more).build()
    with Mesh().use(jax.devices()[:1]):
      program = make_program(tuned)
      batch = {
        key: jax.ShapeDtypeStruct((8, 32), np.int32)
        for key in ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')
      }
      arguments = (
        program.abstract,
        batch,
        jax.ShapeDtypeStruct((), np.float32),
        program.abstract_fixed,
      )
      steps.append((program, jax.jit(program.step).lower(*arguments).compile()))
  (_, everything), (program, vectors) = steps
  assert {name.rpartition('/')[2] for name in names(program.abstract['params'])} == {'scale'}
  assert not any('kernel' in name for name in names(program.abstract['opt']))
  frozen = names(program.abstract_fixed[FROZEN])
  assert len(frozen) + len(names(program.abstract['params'])) == len(program.sources)
  flops = [compiled.cost_analysis()['flops'] for compiled in (everything, vectors)]
  assert flops[1] < 0.8 * flops[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  'method', ['dora', 'ia3', 'adapters', 'parallel_adapters', 'prefix', 'prompt']
)
def test_a_method_trains(method, base, text_file, one_device, tmp_path):
  # The tokens of a prompt are those that the text has.
  more = {
    'prompt': {'FIRST': ord('a') + 3, 'PROMPT': 26},
    'prefix': {'LEARNING_RATE': 0.03, 'Run.steps': 40},  # it starts at random vectors
  }.get(method, {})
  row = run(load(text_file, base, method, **more), tmp_path)
  assert row['status'] == 'finished'
  assert 0 < row['params_learned'] < row['params_total'] / 2
  # It starts as the base: its first loss is near that of the base.
  first = storage.read_rows(tmp_path / 'metrics.jsonl')[0]
  assert abs(first['loss'] - row['init/loss']) < 0.2
  assert row['loss'] < row['init/loss']


@pytest.mark.slow
def test_adapters_over_one_base_learn_together_as_they_do_alone(
  base, text_file, one_device, tmp_path
):
  configurations = [
    load(text_file, base, 'lora', LEARNING_RATE=rate, **{'Run.seed': seed})
    for rate, seed in ((1e-3, 0), (1e-2, 1))
  ]
  assert len({alike.shape(config.build()) for config in configurations}) == 1
  with open(os.devnull, 'w') as silence:
    rows = population.train_population(
      [config.build() for config in configurations],
      [tmp_path / 'a', tmp_path / 'b'],
      [config.text for config in configurations],
      [silence, silence],
    )
  for config, row, name in zip(configurations, rows, 'ab', strict=True):
    alone = run(config, tmp_path / f'{name} alone')
    np.testing.assert_allclose(row['loss'], alone['loss'], rtol=1e-5)
    assert row['params_learned'] == alone['params_learned']
    own_sums = saved(tmp_path / name)[1]
    assert own_sums.keys() == saved(tmp_path / f'{name} alone')[1].keys()


@pytest.mark.slow
def test_lora_over_many_devices_is_lora_on_one(base, text_file, tmp_path):
  """FSDP and tensor parallel: the base is split as the model's parameters are."""
  losses = []
  for mesh in ('data=8', 'fsdp=8', 'fsdp=2, data=2, tensor=2'):
    folder = tmp_path / mesh
    config = load(text_file, base, 'lora')
    the_run = config.build()
    knobs = dict(pair.split('=') for pair in mesh.split(', '))
    object.__setattr__(the_run, 'mesh', Mesh(**{key: int(n) for key, n in knobs.items()}))
    with open(os.devnull, 'w') as silence:
      losses.append(train(the_run, folder, config.text, stream=silence)['loss'])
  np.testing.assert_allclose(losses, losses[0], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['lora', 'start'])
def test_killed_and_restarted_it_is_bit_identical(
  method, base, text_file, user_environment, tmp_path
):
  steps = 200
  config = load(text_file, base, method, **{'Run.steps': steps, 'Run.checkpoint_every': 20})
  command = [sys.executable, '-m', 'research.train', '--gin_file=tests/gin/decoder.gin']
  command += [f'--gin_file=gin/tuning/{method}.gin', f"--gin.FILES='{text_file}'"]
  settings = {**SMALL, 'Run.steps': steps, 'Run.checkpoint_every': 20, 'BASE': repr(str(base))}
  if method == 'start':
    del settings['RANK']
  command += [f'--gin.{key}={value}' for key, value in settings.items()]
  options = {'cwd': ROOT, 'env': user_environment}
  quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
  subprocess.run([*command, f'--workdir={tmp_path / "whole"}'], check=True, **options, **quiet)
  command.append(f'--workdir={tmp_path / "killed"}')
  process = subprocess.Popen(command, **options, **quiet)
  while process.poll() is None:
    rows = storage.read_rows(tmp_path / 'killed' / 'metrics.jsonl')
    if rows and rows[-1]['step'] >= 70:
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.005)
  assert process.wait() == -signal.SIGKILL
  subprocess.run(command, check=True, **options, **quiet)
  assert saved(tmp_path / 'killed') == saved(tmp_path / 'whole')
  assert config.build().steps == steps
