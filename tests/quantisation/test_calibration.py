"""What calibration records of a model's inputs is what its matrices are multiplied with."""

import functools
from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from research.model import counts
from research.model.parameters import param, project
from research.model.stack import Stack, separate_layers
from research.model.weights import Weight
from research.parallel.mesh import Mesh
from research.quantisation import calibration
from research.quantisation.quantised import Quantised
from tests.families import tiny


class Telling(Weight):
  """A plain matrix that keeps its inputs, of models that run operation by operation."""

  told: ClassVar[list[np.ndarray]] = []

  def __init__(self, matrix, *, rngs):
    super().__init__(matrix)
    self.base = param(rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind)

  def __getitem__(self, index):
    return self.base[index]

  def multiply(self, x, to):
    self.told.append(np.asarray(x, np.float64).reshape(-1, np.prod(self.shape[: self.inputs])))
    return project(x, self.base[...], self.axes, to, contract=self.inputs)


def told(model, params, batch) -> list[np.ndarray]:
  """The inputs [tokens, inputs] of every matrix of the model, in the order of the products."""
  Telling.told.clear()
  telling = functools.partial(model, weight=Telling)
  module = nnx.merge(nnx.graphdef(counts.abstract(telling)), params)
  for _, part in nnx.iter_modules(module):
    if isinstance(part, Stack):
      part.remat = 'none'
  separate_layers(module)
  module.features(batch)
  return list(Telling.told)


def test_inputs_are_those_behind_rounded_matrices_and_their_drift():
  """Noise is added to every matrix in place of rounding. The model that has all of it is the reference."""
  tokens = np.random.default_rng(0).integers(1, 64, (2, 2, 8)).astype(np.int32)
  batches = [{'decoder_input_tokens': rows, 'decoder_target_tokens': rows} for rows in tokens]
  plain = tiny('llama2', ['LAYERS=2'])
  quantised = functools.partial(plain, weight=functools.partial(Quantised, format='int8'))
  random = np.random.default_rng(1)
  seen = []
  with Mesh().use(jax.devices()[:1]):
    shapes = nnx.to_pure_dict(nnx.state(counts.abstract(plain)))
    params = jax.tree.map(
      lambda x: random.normal(size=x.shape, scale=0.2).astype(np.float32), shapes
    )
    noisy = jax.tree.map(np.copy, params)

    def rounded(path, layer, inputs):
      node = noisy
      for key in path:
        node = node[key]
      node[layer] += 0.1 * random.normal(size=node[layer].shape).astype(np.float32)
      seen.append(inputs)
      return node[layer]

    calibration.round_in_order(quantised, params, batches, rounded)
    based = [jax.tree.map(jax.numpy.asarray, _with_base(x)) for x in (params, noisy)]
    everything = {'decoder_input_tokens': tokens.reshape(4, 8)}
    original, behind = [told(plain, x, everything) for x in based]
  # Four matrices of attention and three of the MLP, in two layers.
  assert len(seen) == len(behind) == 14
  for inputs, y, x in zip(seen, original, behind, strict=True):
    size = np.abs(x.T @ x).max()
    np.testing.assert_allclose(inputs.gram, x.T @ x, rtol=1e-4, atol=1e-5 * size)
    np.testing.assert_allclose(inputs.drift, x.T @ (y - x), rtol=1e-4, atol=1e-5 * size)


def _with_base(params):
  """Parameters under the names that they have in a model whose matrices are `Weight`s."""
  if not isinstance(params, dict):
    return params
  names = ('kernel', 'tokens', 'weight')
  return {k: {'base': x} if k in names else _with_base(x) for k, x in params.items()}
