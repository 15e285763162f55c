"""`research.quantise` on a run: its folder opens like a run's, loses little, and goes out to Hugging Face."""

import json
import os
import re
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from research import quantise
from research.core import configs
from research.core.errors import UserError
from research.evaluation import loading
from research.huggingface import inwards, outwards
from research.model import counts
from research.parallel.mesh import Mesh
from research.quantisation import calibration, rows
from research.quantisation.quantised import Quantised
from research.training.experience import Experience
from research.training.loop import train
from research.training.program import make_program
from research.tuning import merge, peft
from tests.families import tiny

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


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    ('', 'this model brings no stream: give --validation=FILE'),
    ('--method=gptq --validation={text}', 'and for gptq, awq and smooth --calibration=FILE'),
    ('--validation={text}.gone', r'--validation=.*gone: there is no such file'),
    ('--method=gptq --calibration={text} --validation={text}', 'are the same file'),
    ('--out={text} --validation={text}', 'is not an empty folder'),
    ('--hf={text} --validation={text}', 'there is no such folder'),
    ('--method=gtpq', "invalid choice: 'gtpq'"),
    ('--rows=0', '--rows is 1 or more'),
  ],
)
def test_flags_that_are_wrong_are_told_before_a_model_is_read(
  flags, says, tmp_path, monkeypatch, capsys
):
  text = tmp_path / 'text.txt'
  text.write_text('a text')
  flags = [f'--out={tmp_path}/out', f'--hf={tmp_path}', *flags.format(text=text).split()]
  monkeypatch.setattr(sys, 'argv', ['quantise', '--gin_file=gin/quantisation/int4.gin', *flags])
  with pytest.raises((UserError, SystemExit)) as raised:
    quantise.main(quantise._flags())
  assert re.search(says, f'{raised.value} {capsys.readouterr().err}')


def test_a_run_that_made_its_own_rows_has_nothing_to_calibrate_on():
  made = mock.Mock(spec=Experience, lengths={'targets': 8})
  with pytest.raises(UserError, match='no stream to calibrate on; take --method=nearest'):
    rows.of_run(SimpleNamespace(train=made, validation=None, seed=0), 8)


def test_a_text_is_read_by_a_decoder_and_its_own_tokenizer(smollm2, tmp_path, one_device):
  (tmp_path / 'text.txt').write_text('a text ' * 20)
  flags = SimpleNamespace(
    tokenizer=None, validation=str(tmp_path / 'text.txt'), length=8, method='nearest'
  )
  folder = SimpleNamespace(run=None, path=smollm2, model=tiny('llama2'))
  with pytest.raises(UserError, match='49152 ids and the model 64 logits'):
    quantise._batches(folder, 'hf', flags)
  for family in ('t5', 'bert'):
    with pytest.raises(UserError, match='this model is no decoder'):
      quantise._batches(SimpleNamespace(run=None, model=tiny(family)), 'hf', flags)


def test_a_model_that_is_quantised_is_quantised_again_in_another_format(command, capsys):
  once = command('--gin_file=gin/quantisation/int4.gin', '--gin.GROUP=8')
  once.rename(once.parent / 'once')
  out = command('--gin_file=gin/quantisation/int8.gin', checkpoint=once.parent / 'once')
  assert 'are not plain: what they stand for is rounded' in capsys.readouterr().err
  folder = loading.open_folder(out)
  weights = [
    m for _, m in nnx.iter_modules(counts.abstract(folder.model)) if isinstance(m, Quantised)
  ]
  assert {(m.form.name, m.offsets, m.layout.groups) for m in weights} == {('int8', False, 1)}
  assert opened_loss(out) == pytest.approx(opened_loss(once.parent / 'once'), rel=1e-3)


def test_an_aware_run_is_rounded_to_what_it_saw(command, text_file, tmp_path, one_device):
  lines = [f"FILES='{text_file}'", 'Run.steps=4', 'LAYERS=1', 'BITS=4']
  config = configs.load(['tests/gin/decoder.gin', 'gin/quantisation/aware.gin'], lines)
  with config.explains(), open(os.devnull, 'w') as silence:
    train(config.build(), tmp_path / 'aware', config.text, stream=silence)
  flags = [
    '--gin_file=gin/quantisation/int4.gin',
    '--gin.GROUP=None',
    '--gin.Quantised.offsets=False',
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
