"""Every kind of parallelism, and products of two, give the losses and gradients of one device.

In float32; the loss to 1e-5 of itself, every gradient to 1e-5 of its largest entry. Models are a decoder with
grouped queries on packed rows, an encoder-decoder with relative positions, a mixture of experts, and Mamba.
"""

import functools
import types

import jax
import numpy as np
import pytest
from families import tiny
from flax import nnx

from research import sharding, train

ROWS, LENGTH, TOLERANCE = 8, 16, 1e-5
MODELS = {'decoder': 'llama2', 'encoder_decoder': 't5', 'moe': 'mixtral', 'mamba': 'mamba'}


@functools.cache
def model_of(name):
  depth = ('ENCODER_LAYERS', 'DECODER_LAYERS') if name == 'encoder_decoder' else ('LAYERS',)
  # Of a microbatch the load balance is another than of a batch; test_pipeline has that.
  moe = ('Router.balance=0.0',) if name == 'moe' else ()
  return tiny(MODELS[name], ('Stack.scan=True', *(f'{layers}=4' for layers in depth), *moe))


def packed(rng, length, documents=3):
  """Rows of `documents` documents and some padding, as the stream would have them."""
  cuts = np.sort(rng.integers(1, length, (ROWS, documents)), axis=1)
  place = np.arange(length)
  segments = 1 + np.sum(place >= cuts[:, :-1, None], axis=1)
  starts = np.concatenate([np.zeros((ROWS, 1), int), cuts[:, :-1]], axis=1)
  positions = place - np.take_along_axis(starts, segments - 1, axis=1)
  real = place < np.maximum(cuts[:, -1:], length - 3)
  return {
    'input_tokens': np.where(real, rng.integers(1, 64, (ROWS, length)), 0),
    'segment_ids': np.where(real, segments, 0),
    'positions': np.where(real, positions, 0),
  }


@functools.cache
def batch_of(name):
  rng = np.random.default_rng(0)
  batch = {f'decoder_{k}': v for k, v in packed(rng, LENGTH).items()}
  batch['decoder_target_tokens'] = np.roll(batch['decoder_input_tokens'], -1, axis=1)
  batch['decoder_loss_weights'] = (batch['decoder_target_tokens'] > 0) & (
    rng.random((ROWS, LENGTH)) < 0.8
  )
  if name == 'encoder_decoder':
    batch |= {f'encoder_{k}': v for k, v in packed(rng, 2 * LENGTH).items()}
  return {k: v.astype(np.int32) for k, v in batch.items()}


def results(name, mesh, devices=None, params=None):
  """(loss, what it is made of, gradients) as host arrays, and the parameters, which one device makes."""
  with mesh.use(devices):
    model = model_of(name)
    make = lambda key: model(rngs=nnx.Rngs(params=key))
    abstract = jax.eval_shape(make, jax.random.key(0))
    run = types.SimpleNamespace(model=model, z_loss=1e-4, microbatches=1)
    program = train.Program(run, nnx.graphdef(abstract), 2)
    if params is None:
      params = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(jax.random.key(0))
    else:
      places = jax.tree.map(
        lambda x: jax.sharding.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec),
        nnx.to_pure_dict(nnx.state(abstract)),
      )
      params = jax.device_put(params, places)
    gradient = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    (loss, sums), grads = gradient(params, sharding.place(batch_of(name)))
    return jax.tree.map(np.asarray, (loss, sums, grads)), jax.tree.map(np.asarray, params)


@functools.cache
def one_device(name):
  return results(name, sharding.Mesh(), jax.devices()[:1])


def check(name, **sizes):
  (loss, sums, grads), params = one_device(name)
  mesh = sharding.Mesh(**{'data': -1, **sizes})
  (loss2, sums2, grads2), _ = results(name, mesh, params=params)
  np.testing.assert_allclose(loss2, loss, rtol=TOLERANCE)
  for key, value in sums.items():
    np.testing.assert_allclose(sums2[key], value, rtol=TOLERANCE, atol=1e-7, err_msg=key)
  for (path, g), g2 in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grads2), strict=True):
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(g2, g, rtol=0, atol=TOLERANCE * np.abs(g).max(), err_msg=where)


KINDS = {
  'data': {},
  'fsdp': {'data': 1, 'fsdp': -1},
  'tensor': {'tensor': 2},
  'context': {'context': 4},
  'expert': {'expert': 4},
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', MODELS)
def test_a_mesh_changes_nothing(name, kind):
  check(name, **KINDS[kind])
