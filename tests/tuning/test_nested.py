"""Nested sizes: a row of a training batch trains the model of its turn, and shrinking cuts that model out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import configs
from research.core.errors import Invalid
from research.model import counts
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training import row_seeds
from research.training.program import make_program
from research.tuning import shrinking
from tests.families import tiny
from tests.training.test_noise import packed_batch
from tests.tuning.test_shrinking import batch_of, logits, one_device_in_use, random_params

__all__ = ['one_device_in_use']  # pytest uses it in every test of this file

NESTED = 'Mlp.nested=(0.25, 0.5, 1.0)'


def test_a_row_in_training_is_the_model_that_shrinking_cuts_out():
  model = tiny('llama2', [NESTED])
  params = random_params(model)
  batch = batch_of(tiny('llama2'), params)
  batch = {key: np.tile(x, (2, 1))[:3] for key, x in batch.items()}
  # The first row's turn at step 4 is the second of the three sizes.
  training = row_seeds.with_seeds(batch, jnp.int32(4))
  rows = logits(model, params, training)
  quarter = tiny('llama2', ['MLP=8'])
  abstract = counts.abstract(model), counts.abstract(quarter)
  new, kept = shrinking.shrink(*abstract, params, [batch], print)
  assert all((np.diff(index) == 1).all() for index in kept.units.values())
  np.testing.assert_allclose(rows[2], logits(quarter, new, batch)[2], atol=1e-5)
  whole = logits(tiny('llama2'), params, batch)
  np.testing.assert_allclose(rows[1], whole[1], atol=1e-5)
  assert np.abs(rows[0] - whole[0]).max() > 0.1  # the first row uses half of the units
  # Without seeds, as in an evaluation and in decoding, all units are used.
  np.testing.assert_array_equal(logits(model, params, batch), whole)


@pytest.mark.parametrize(
  ('fractions', 'why'),
  [
    ('(0.5, 0.25, 1.0)', 'must rise'),
    ('(0.25, 0.5)', 'must rise'),
    ('(0.0, 1.0)', 'must rise'),
    ('(0.3, 1.0)', 'whole numbers'),
  ],
)
def test_fractions_that_are_no_sizes_are_refused(fractions, why):
  with pytest.raises(Invalid, match=why):
    counts.abstract(tiny('llama2', [f'Mlp.nested={fractions}']))


@pytest.mark.slow
def test_however_a_batch_is_cut_its_rows_train_the_same_sizes(text_file):
  lines = [f"FILES='{text_file}'", 'LAYERS=2', NESTED]
  run = configs.load('tests/gin/decoder.gin', lines).build()

  def gradient(run, mesh: Mesh, devices: int):
    with mesh.use(jax.devices()[:devices]):
      program = make_program(run)
      assert program.seeded
      state = jax.jit(program.init)(jax.random.key(0))
      _, scalars = jax.jit(program.step)(state, hosts.place(packed_batch()), np.float32(0.0))
      return float(scalars['loss']), float(scalars['grad_norm'])

  expected = gradient(run, Mesh(), 1)
  plain = dataclasses.replace(
    run, model=configs.load('tests/gin/decoder.gin', lines[:2]).build().model
  )
  with Mesh().use(jax.devices()[:1]):
    assert not make_program(plain).seeded
  cut = dataclasses.replace(run, microbatches=4)
  np.testing.assert_allclose(gradient(cut, Mesh(), 1), expected, rtol=2e-6)
  for mesh in (Mesh(data=8), Mesh(fsdp=2, tensor=2, context=2), Mesh(stage=2, data=4)):
    np.testing.assert_allclose(gradient(run, mesh, 8), expected, rtol=2e-5)
