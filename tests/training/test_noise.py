"""Noise on token vectors: in training alone, the same however a batch is cut, another one at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import configs
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training import row_seeds
from research.training.program import make_program


def test_seeds_are_of_a_step_a_row_and_a_side():
  batch = {'decoder_input_tokens': np.zeros((3, 4), np.int32)}
  decoders = [
    np.asarray(row_seeds.with_seeds(batch, jnp.int32(step))['row_seeds']) for step in (0, 1)
  ]
  encoders = [seeds ^ np.uint32(1) for seeds in decoders]
  seeds = np.concatenate([*decoders, *encoders])
  assert len(np.unique(seeds, axis=0)) == len(seeds) == 12


def packed_batch() -> dict:
  """Rows of two documents, of 12 and of 20 tokens."""
  tokens = np.random.default_rng(0).integers(3, 200, (8, 32), np.int32)
  rows = {
    'decoder_segment_ids': np.repeat([1, 2], [12, 20]),
    'decoder_positions': np.concatenate([np.arange(12), np.arange(20)]),
    'decoder_loss_weights': np.ones(32),
  }
  return {
    'decoder_input_tokens': tokens,
    'decoder_target_tokens': np.roll(tokens, -1, 1),
    **{key: np.tile(row.astype(np.int32), (8, 1)) for key, row in rows.items()},
  }


def losses(run, step: int = 0, mesh: Mesh | None = None) -> tuple[float, float]:
  """(the loss of a training step, the loss of an evaluation) of the parameters that the seed gives."""
  devices = jax.devices() if mesh else jax.devices()[:1]
  with (mesh or Mesh()).use(devices):
    program = make_program(run)
    batch = hosts.place(packed_batch())
    state = jax.jit(program.init)(jax.random.key(0))
    state['step'] = state['step'] + step
    sums = jax.jit(program.evaluate)(state['params'], batch)
    _, scalars = jax.jit(program.step)(state, batch, np.float32(0.0))
    return float(scalars['loss']), float(sums['loss'] / sums['weight'])


@pytest.mark.slow
def test_training_has_the_noise_and_evaluation_none(text_file):
  def run(alpha: float, **knobs):
    lines = [f"FILES='{text_file}'", 'LAYERS=1', f'Embedder.noise={alpha}']
    return dataclasses.replace(configs.load('tests/gin/decoder.gin', lines).build(), **knobs)

  training, evaluation = losses(run(0.0))
  np.testing.assert_allclose(training, evaluation, rtol=1e-6)
  noisy, evaluation_of_noisy = losses(run(10.0))
  assert evaluation_of_noisy == evaluation
  assert abs(noisy - training) > 1e-4 * training
  assert losses(run(10.0), step=1)[0] != noisy
  # However a batch is cut, into parts or over devices, its rows have the same noise.
  np.testing.assert_allclose(losses(run(10.0, microbatches=4))[0], noisy, rtol=1e-6)
  for mesh in (Mesh(data=8), Mesh(fsdp=4, context=2)):
    np.testing.assert_allclose(losses(run(10.0), mesh=mesh)[0], noisy, rtol=2e-6)
