"""Rounding a whole model: which matrices are filled by which method."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from research.core.errors import UserError
from research.model import counts
from research.parallel.mesh import Mesh
from research.quantisation import post_training
from research.tuning import merge
from tests.families import PRESETS, tiny

# The projections of attention in bfloat16, everything else in int4.
MIXED = """from __gin__ import dynamic_registration
from research.model import attention
from research.model import layers
from research.quantisation import quantised
include 'gin/quantisation/int4.gin'
GROUP = 8
attention.Attention.linear = @half/layers.Linear
half/layers.Linear.weight = @quantised.BFloat16
"""


@pytest.mark.slow
def test_a_model_that_was_packed_keeps_its_numbers_and_another_is_refused():
  files = [f'gin/models/{PRESETS["llama2"]}.gin', 'gin/quantisation/int4.gin']
  model = tiny('llama2', ['LAYERS=1', 'GROUP=8'], files)
  random = np.random.default_rng(0)
  shapes = nnx.to_pure_dict(nnx.state(counts.abstract(tiny('llama2', ['LAYERS=1']))))
  params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
  weights = post_training.weights_to_fill(model, 'keep')
  with pytest.raises(
    UserError, match=r'embedder/tokens: .* are on no grid of int8.* another --method'
  ):
    post_training.quantise(model, weights, params, 'keep')
  rounded, _ = post_training.quantise(model, weights, params, 'nearest')
  with Mesh().use(jax.devices()[:1]):
    _, packed = merge.merged(model, jax.tree.map(jax.numpy.asarray, rounded))
  kept, errors = post_training.quantise(model, weights, packed, 'keep')
  assert {(error.method, error.weights) for error in errors} == {('keep', 0.0)}
  with Mesh().use(jax.devices()[:1]):
    _, again = merge.merged(model, jax.tree.map(jax.numpy.asarray, kept))
  jax.tree.map(np.testing.assert_array_equal, again, packed)


def test_matrices_in_bfloat16_stay_plain_beside_matrices_that_gptq_rounds(tmp_path):
  (tmp_path / 'mixed.gin').write_text(MIXED)
  files = [f'gin/models/{PRESETS["llama2"]}.gin', str(tmp_path / 'mixed.gin')]
  model = tiny('llama2', ['LAYERS=1'], files)
  random = np.random.default_rng(0)
  tokens = random.integers(1, 64, (4, 8)).astype(np.int32)
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens}
  plain = nnx.to_pure_dict(nnx.state(counts.abstract(tiny('llama2', ['LAYERS=1']))))
  params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), plain)
  weights = post_training.weights_to_fill(model, 'gptq')
  with Mesh().use(jax.devices()[:1]):
    filled, errors = post_training.quantise(model, weights, params, 'gptq', [batch])
  attention, mlp = filled['stack']['sublayers'][0], filled['stack']['sublayers'][1]
  query = attention['parts'][0]['query']['kernel']['packed']
  original = params['stack']['sublayers'][0]['parts'][0]['query']['kernel']
  np.testing.assert_array_equal(query, original.astype(ml_dtypes.bfloat16))
  assert mlp['parts'][0]['output']['kernel']['packed'].dtype == np.uint8
  # The MLP's three matrices by GPTQ; the inputs of token vectors and head are not recorded.
  methods = sorted(error.method for error in errors)
  assert methods == ['gptq', 'gptq', 'gptq', 'nearest', 'nearest']


def test_a_number_that_an_offset_cannot_hold_is_refused():
  files = [f'gin/models/{PRESETS["llama2"]}.gin', 'gin/quantisation/int4.gin']
  model = tiny('llama2', ['LAYERS=1', 'GROUP=8'], files)
  plain = nnx.to_pure_dict(nnx.state(counts.abstract(tiny('llama2', ['LAYERS=1']))))
  params = jax.tree.map(lambda x: np.full(x.shape, 7e4, np.float32), plain)
  weights = post_training.weights_to_fill(model, 'nearest')
  with pytest.raises(UserError, match=r'kernel 0: its largest number is 7e\+04, .*offsets=False'):
    post_training.quantise(model, weights, params, 'nearest')
