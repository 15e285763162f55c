"""What is quantised is one model on every mesh, in a population, and under LoRA."""

import functools
import json
import os
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from research import quantise
from research.core import configs
from research.evaluation import loading
from research.model.parameters import abstract_model
from research.parallel.mesh import Mesh
from research.quantisation.quantised import Quantised
from research.quantisation.straight_through import StraightThrough
from research.training import population
from research.training.loop import train
from research.tuning import peft
from tests.families import tiny

pytestmark = pytest.mark.slow
MESHES = {'data x tensor': Mesh(data=4, tensor=2), 'fsdp x tensor': Mesh(data=1, fsdp=4, tensor=2)}
KNOBS = {
  'int4': {'format': 4, 'group': 4, 'offsets': True},
  'int8 times int8': {'format': 'int8', 'activations': 'int8'},
  'nf4': {'format': 'nf4', 'group': 8, 'input_scales': True},
}
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def logits_on(mesh: Mesh, devices, model) -> np.ndarray:
  """Of eight rows; parameters are drawn on the mesh."""
  tokens = np.random.default_rng(0).integers(1, 64, (8, 8)).astype(np.int32)
  with mesh.use(devices):
    graphdef = nnx.graphdef(abstract_model(model))

    @jit
    def run(key, tokens):
      params = nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))
      return nnx.merge(graphdef, params)({'decoder_input_tokens': tokens})[0]

    return np.asarray(run(jax.random.key(0), tokens))


@pytest.mark.parametrize(
  ('family', 'knobs', 'mesh'),
  [
    ('llama2', 'int4', 'fsdp x tensor'),
    ('llama2', 'int8 times int8', 'fsdp x tensor'),
    ('mixtral', 'nf4', 'data x tensor'),
  ],
)
def test_on_every_mesh_it_says_what_it_says_on_one_device(family, knobs, mesh):
  model = functools.partial(tiny(family), weight=functools.partial(Quantised, **KNOBS[knobs]))
  alone = logits_on(Mesh(), jax.devices()[:1], model)
  split = logits_on(MESHES[mesh], jax.devices(), model)
  np.testing.assert_allclose(split, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize(
  'weight',
  [
    functools.partial(Quantised, **KNOBS['int4']),
    functools.partial(StraightThrough, format=3, activations=4),
  ],
  ids=['int4', 'trained in 3 bits'],
)
def test_layers_that_are_scanned_are_layers_one_by_one(weight):
  scanned, one_by_one = (
    logits_on(Mesh(), jax.devices()[:1], functools.partial(tiny('llama2', [scan]), weight=weight))
    for scan in ('Stack.scan=True', 'Stack.scan=False')
  )
  np.testing.assert_allclose(scanned, one_by_one, rtol=0, atol=1e-4 * np.abs(scanned).max())


def load(text_file, files=(), **more):
  settings = {'Run.steps': 6, 'Run.log_every': 1, 'LAYERS': 1, **more}
  lines = [f"FILES='{text_file}'", *(f'{key}={value}' for key, value in settings.items())]
  return configs.load(['tests/gin/decoder.gin', *files], lines)


def run(config, workdir, mesh=None) -> dict:
  the_run = config.build()
  object.__setattr__(the_run, 'mesh', mesh)
  with config.explains(), open(os.devnull, 'w') as silence:
    return train(the_run, workdir, config.text, stream=silence)


AWARE = ['gin/quantisation/aware.gin']


def test_aware_runs_learn_together_as_alone(text_file, tmp_path, one_device):
  made = [
    load(text_file, AWARE, **{'Run.seed': seed}, BITS=3, ACTIVATION_BITS=4) for seed in (0, 1)
  ]
  with open(os.devnull, 'w') as silence:
    rows = population.train_population(
      [config.build() for config in made], [tmp_path / 'a', tmp_path / 'b'],
      [config.text for config in made], [silence, silence],
    )  # fmt: skip
  for config, row, name in zip(made, rows, 'ab', strict=True):
    alone = run(config, tmp_path / f'{name} alone')
    np.testing.assert_allclose(row['loss'], alone['loss'], rtol=1e-4)
  plain = run(load(text_file), tmp_path / 'plain')
  assert abs(plain['loss'] - rows[0]['loss']) > 1e-4


def test_an_aware_run_is_the_same_on_a_mesh(text_file, tmp_path):
  config = load(text_file, AWARE, BITS=4, **{'Run.steps': 3})
  losses = [
    run(config, tmp_path / name, mesh)['loss']
    for name, mesh in (
      ('one', Mesh(data=8)),
      ('split', Mesh(data=2, fsdp=2, tensor=2)),
    )
  ]
  # A number at the border of two codes may be rounded either way.
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_an_aware_run_resumes_to_the_bit(text_file, tmp_path, one_device):
  config = load(text_file, AWARE, BITS=3, **{'Run.checkpoint_every': 4})

  def params() -> dict:
    folder = loading.open_folder(tmp_path / 'run')
    assert folder.step == 6
    return peft.params_of(folder.model, folder.params)

  whole_row = run(config, tmp_path / 'run')
  whole = params()
  # As if it had been killed after the checkpoint of step 4.
  (tmp_path / 'run' / 'checkpoints' / '6').rename(tmp_path / 'gone')
  (tmp_path / 'run' / 'run.json').unlink()
  assert run(config, tmp_path / 'run')['loss'] == whole_row['loss']
  jax.tree.map(np.testing.assert_array_equal, whole, params())


def test_lora_learns_beside_a_quantised_base(text_file, tmp_path, one_device, monkeypatch):
  run(load(text_file, **{'Run.steps': 20}), tmp_path / 'base')
  argv = ['quantise', f'--checkpoint={tmp_path}/base', f'--out={tmp_path}/nf4']
  monkeypatch.setattr(sys, 'argv', [*argv, '--gin_file=gin/quantisation/nf4.gin'])
  quantise.main(quantise._flags())
  files = ['gin/tuning/lora.gin', 'gin/quantisation/qlora.gin']
  config = load(text_file, files, BASE=f"'{tmp_path}/nf4'", RANK=2, **{'Run.steps': 20})
  row = run(config, tmp_path / 'tuned')
  rounded = json.loads((tmp_path / 'nf4' / 'quantisation.json').read_text())['loss_after']
  assert row['loss'] < rounded
  assert row['params_learned'] < 0.3 * row['params_total']
