"""What calibration records of a model's inputs is what its matrices are multiplied with."""

import functools
from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from research.model import counts
from research.model.parameters import param, project
from research.model.weights import Weight
from research.parallel.mesh import Mesh
from research.quantisation import calibration
from research.quantisation.quantised import Quantised
from tests.families import tiny


class Telling(Weight):
  """A plain matrix that hands its inputs to the host."""

  told: ClassVar[list[np.ndarray]] = []

  def __init__(self, matrix, *, rngs):
    super().__init__(matrix)
    self.base = param(rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind)

  def __getitem__(self, index):
    return self.base[index]

  def multiply(self, x, to):
    jax.debug.callback(lambda x: self.told.append(np.asarray(x, np.float64)), x)
    return project(x, self.base[...], self.axes, to, contract=self.inputs)


def test_the_gram_of_a_matrix_is_the_sum_over_its_inputs():
  tokens = np.random.default_rng(0).integers(1, 64, (2, 2, 8)).astype(np.int32)
  batches = [{'decoder_input_tokens': rows, 'decoder_target_tokens': rows} for rows in tokens]
  plain = tiny('llama2', ['LAYERS=1'])
  telling = functools.partial(plain, weight=Telling)
  quantised = functools.partial(plain, weight=functools.partial(Quantised, format='int8'))
  with Mesh().use(jax.devices()[:1]):
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(telling(rngs=nnx.Rngs(params=0)))))()
    grams = calibration.grams(calibration.recorded(quantised), params, batches)
    graphdef = nnx.graphdef(counts.abstract(telling))
    everything = {'decoder_input_tokens': tokens.reshape(4, 8)}
    jax.jit(lambda p: nnx.merge(graphdef, p)(everything)[0])(params)
    jax.effects_barrier()
  flat = [x.reshape(32, -1) for x in Telling.told]
  expected = sorted((x.T @ x for x in flat), key=np.trace)
  # Queries, keys and values have one input, as gate and up have. The order is that of the trace.
  ours = sorted((x[0] for x in grams.values()), key=np.trace)
  assert len(ours) == len(expected) == 7
  for x, reference in zip(ours, expected, strict=True):
    np.testing.assert_allclose(x, reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())
