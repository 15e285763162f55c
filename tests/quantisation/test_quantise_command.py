"""`research.quantise` on a run: its folder opens like a run's, loses little, and goes out to Hugging Face."""

import json
import os
import sys

import jax
import numpy as np
import pytest

from research import quantise
from research.core import configs
from research.core.errors import UserError
from research.evaluation import loading
from research.huggingface import inwards, outwards
from research.parallel.mesh import Mesh
from research.quantisation import calibration, rows
from research.training.loop import train
from research.training.program import make_program
from research.tuning import merge, peft

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def base(text_file, tmp_path_factory):
  """A trained run."""
  workdir = tmp_path_factory.mktemp('base')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    lines = [f"FILES='{text_file}'", 'Run.steps=30', 'Run.log_every=10', 'LAYERS=1']
    config = configs.load(['tests/gin/decoder.gin'], lines)
    with config.explains(), open(os.devnull, 'w') as silence:
      train(config.build(), workdir, config.text, stream=silence)
  return workdir


@pytest.fixture
def command(base, monkeypatch, one_device, tmp_path):
  """Runs the command within this process; the folder that it wrote."""

  def run(*flags: str, checkpoint=base):
    out = tmp_path / 'out'
    argv = ['quantise', f'--checkpoint={checkpoint}', f'--out={out}', *flags]
    monkeypatch.setattr(sys, 'argv', argv)
    quantise.main(quantise._flags())
    return out

  return run


def opened_loss(path) -> float:
  """The validation loss of the checkpoint in a folder, read as every command reads it."""
  folder = loading.open_folder(path)
  with Mesh().use(jax.devices()[:1]):
    params = jax.tree.map(np.asarray, loading.read_params(folder))
    _, batches = rows.of_run(folder.run, 1)
    return calibration.loss_of(folder.model, params, batches)


@pytest.mark.parametrize(
  'flags',
  [
    ('--gin_file=gin/quantisation/int8.gin',),
    ('--gin_file=gin/quantisation/int4.gin', '--method=gptq'),
    ('--gin_file=gin/quantisation/int4.gin', '--method=awq', '--gin.INPUT_SCALES=True'),
    ('--gin_file=gin/quantisation/w8a8.gin', '--method=smooth', '--gin.INPUT_SCALES=True'),
    ('--gin_file=gin/quantisation/nf4.gin',),
    ('--gin_file=gin/quantisation/fp8.gin',),
    ('--gin_file=gin/quantisation/bfloat16.gin', '--gin_file=gin/quantisation/int8.gin'),
  ],
  ids=lambda flags: flags[-1].split('=')[-1],
)
def test_the_folder_opens_and_holds_what_was_measured(command, flags):
  out = command(*flags)
  report = json.loads((out / 'quantisation.json').read_text())
  assert report['loss_after'] == pytest.approx(opened_loss(out), abs=1e-5)
  assert report['loss_after'] < 1.1 * report['loss_before']
  methods = {matrix['method'] for matrix in report['matrices']}
  chosen = next((f.split('=')[1] for f in flags if f.startswith('--method')), 'nearest')
  # The inputs of token vectors and of the head are not seen.
  assert methods == {chosen, 'nearest'}


def test_what_is_rounded_once_is_not_changed_by_a_second_time_and_goes_out(command, tmp_path):
  out = command('--gin_file=gin/quantisation/int8.gin')
  folder = loading.open_folder(out)
  plain, params = merge.merged(folder.model, peft.params_of(folder.model, folder.params))
  outwards.save(tmp_path / 'hf', merge.Tree(plain), params, 'llama', 'float32', 1e9, out)
  _, arrays = inwards.load(tmp_path / 'hf')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), arrays, params)
  out.rename(tmp_path / 'once')
  again = command('--gin_file=gin/quantisation/int8.gin', checkpoint=tmp_path / 'once')
  report = json.loads((again / 'quantisation.json').read_text())
  assert report['loss_after'] == pytest.approx(report['loss_before'], abs=1e-6)


def test_what_does_not_go_together_is_told(command, base):
  with pytest.raises(UserError, match='input_scales = False, and --method=awq needs them'):
    command('--gin_file=gin/quantisation/int4.gin', '--method=awq')
  with pytest.raises(UserError, match='quantise nothing'):
    command('--gin_file=gin/quantisation/bfloat16.gin')
  with pytest.raises(UserError, match='own streams'):
    command('--gin_file=gin/quantisation/int4.gin', '--validation=some.txt')


def test_training_that_foresees_the_rounding_is_rounded_to_what_it_saw(
  command, text_file, tmp_path, one_device
):
  lines = [f"FILES='{text_file}'", 'Run.steps=4', 'LAYERS=1', 'BITS=4']
  config = configs.load(['tests/gin/decoder.gin', 'gin/quantisation/aware.gin'], lines)
  with config.explains(), open(os.devnull, 'w') as silence:
    train(config.build(), tmp_path / 'aware', config.text, stream=silence)
  flags = [
    '--gin_file=gin/quantisation/int4.gin',
    '--gin.GROUP=None',
    '--gin.Quantised.zeros=False',
  ]
  out = command(*flags, checkpoint=tmp_path / 'aware')
  report = json.loads((out / 'quantisation.json').read_text())
  layers = [m for m in report['matrices'] if m['name'].startswith('stack')]
  assert all(matrix['weights'] < 1e-10 for matrix in layers)


def test_a_quantised_run_does_not_train_until_something_learns(command):
  out = command('--gin_file=gin/quantisation/nf4.gin')
  config = configs.load(str(out / 'config.gin'))
  with Mesh().use(jax.devices()[:1]), pytest.raises(UserError, match='cannot learn'):
    make_program(config.build())
