"""Matrices in few bits are, wherever a model reads them, the matrices that their codes stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core import configs
from research.core.errors import Invalid
from research.model import counts
from research.model.weights import Matrix
from research.parallel.mesh import Mesh
from research.quantisation import post_training
from research.quantisation.formats import FORMATS
from research.quantisation.quantised import BFloat16, Quantised
from research.quantisation.straight_through import StraightThrough
from research.training import learning
from research.tuning import lora, merge
from tests.families import tiny

KNOBS = {
  'int8': {'format': 'int8'},
  'int4 with offsets': {'format': 4, 'group': 4, 'offsets': True},
  'int3 with input scales': {'format': 3, 'group': 8, 'input_scales': True},
  'nf4': {'format': 'nf4', 'group': 8},
  'fp8': {'format': 'fp8_e4m3', 'group': 8},
  'int2': {'format': 2, 'group': 4},
}
OUTPUT = Matrix(
  (4, 8, 6), ('heads', 'head_dim', 'embed'), nnx.initializers.normal(1.0), inputs=2
)  # fmt: skip
TABLE = Matrix((10, 16), ('vocab', 'embed'), nnx.initializers.normal(1.0), kind='table')


@pytest.fixture(autouse=True)
def on_one_device():
  with Mesh().use(jax.devices()[:1]):
    yield


# One program in place of dozens of operations that are compiled one by one.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def filled(matrix: Matrix, knobs: dict, kind=Quantised):
  """A weight, and its arrays with input scales other than one."""
  graphdef = nnx.graphdef(jax.eval_shape(lambda: kind(matrix, **knobs, rngs=nnx.Rngs(params=0))))

  @jit
  def make():
    state = nnx.to_pure_dict(nnx.state(kind(matrix, **knobs, rngs=nnx.Rngs(params=0))))
    if 'input_scale' in state:
      shape = state['input_scale'].shape
      state['input_scale'] = jax.random.uniform(jax.random.key(1), shape, minval=0.5, maxval=2.0)
    return state

  return nnx.merge(graphdef, make())


def called(weight, f):
  """f(weight), compiled as one program."""
  graphdef, state = nnx.graphdef(weight), nnx.to_pure_dict(nnx.state(weight))
  return jit(lambda state: f(nnx.merge(graphdef, state)))(state)


def by_hand(weight: Quantised) -> np.ndarray:
  """The matrix of a weight, number by number."""
  packed, scale = np.asarray(weight.packed[...]), np.asarray(weight.scale[...])
  axis, form = weight.layout.axis, weight.form
  matrix = np.empty(weight.shape, np.float32)
  for index in np.ndindex(matrix.shape):
    place = list(index)
    place[axis] //= form.per_byte
    code = packed[tuple(place)]
    if form.per_byte > 1:
      width = 8 // form.per_byte
      code = (code >> (width * (index[axis] % form.per_byte))) & (2**width - 1)
    group = [i if n > 1 else 0 for i, n in zip(index, scale.shape, strict=True)]
    group[axis] = index[axis] // weight.layout.group
    offset = None
    if weight.offsets:
      offset = np.asarray(weight.offset[...])[tuple(group)]
    value = form.decode(np.atleast_1d(code), scale[tuple(group)], offset)[0]
    if weight.input_scale is not None:
      value /= np.asarray(weight.input_scale[...])[index[: weight.inputs]]
    matrix[index] = value
  return matrix


FAST = ('int8', 'int4 with offsets', 'int3 with input scales')
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KNOBS]


@pytest.mark.parametrize('name', EACH)
def test_a_matrix_is_what_its_codes_stand_for(name):
  weight = filled(OUTPUT, KNOBS[name])
  matrix = by_hand(weight)
  x = np.random.default_rng(2).normal(size=(2, 3, 4, 8)).astype(np.float32)
  to = ('batch', 'length', 'embed')
  whole, y = called(weight, lambda w: (w[...], w.multiply(jnp.asarray(x), to)))
  np.testing.assert_allclose(whole, matrix, rtol=1e-6)
  np.testing.assert_allclose(y, np.einsum('blhk,hke->ble', x, matrix), rtol=1e-4, atol=1e-4)
  assert np.linalg.norm(matrix) == pytest.approx(np.sqrt(matrix.size), rel=0.5)


@pytest.mark.parametrize('name', EACH[1:])
def test_rows_of_a_table_are_rows_of_the_matrix(name):
  weight = filled(TABLE, KNOBS[name])
  matrix = by_hand(weight)
  index = np.array([[0, 9, 3]])
  rows = called(weight, lambda w: w.rows(jnp.asarray(index), jnp.float32))
  np.testing.assert_allclose(rows, matrix[index], rtol=1e-6)


INTEGERS = [name for name, form in FORMATS.items() if form.is_integer]
EVERY = [(name, False) for name in FORMATS] + [(name, True) for name in INTEGERS]
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 8)).astype(np.int32)


@functools.cache
def one_layer():
  """A model with plain matrices, and its logits as a function of its parameters, compiled once."""
  plain = tiny('llama2', ['LAYERS=1'])
  graphdef = nnx.graphdef(counts.abstract(plain))
  return plain, jit(lambda params: nnx.merge(graphdef, params)({'decoder_input_tokens': TOKENS})[0])


def dequantised(weight: Quantised, stored: dict) -> np.ndarray:
  """The matrix of stored arrays [layers..., matrix's shape], in numpy."""
  axis = weight.layout.axis - len(weight.shape)  # from the end, for layers stand before
  spread = lambda x: np.repeat(x, weight.layout.group, axis=axis)
  stored = {name: np.asarray(x) for name, x in stored.items()}
  offset = spread(stored['offset']) if weight.offsets else None
  codes = weight.form.unpack(stored['packed'], axis)
  return weight.form.decode(codes, spread(stored['scale']), offset)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'offsets'), EVERY)
def test_logits_are_those_of_the_dequantised_model(name, offsets):
  """Every matrix is packed: projections, token vectors and head. The dequantised model has plain ones."""
  plain, logits = one_layer()
  knobs = {'format': name, 'group': 4, 'offsets': offsets}
  model = functools.partial(plain, weight=functools.partial(Quantised, **knobs))
  module = counts.abstract(model)
  graphdef = nnx.graphdef(module)
  params = jit(lambda: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=0)))))()
  packed = jit(lambda p: nnx.merge(graphdef, p)({'decoder_input_tokens': TOKENS})[0])(params)
  whole, matrices = params, 0
  for path, weight in nnx.iter_modules(module):
    if isinstance(weight, Quantised):
      matrices += 1
      stored = functools.reduce(lambda node, key: node[key], path, params)
      whole = post_training._put(whole, path, dequantised(weight, stored))
  assert matrices == 9  # four of attention, three of the MLP, token vectors and head
  expected = np.asarray(logits(whole))
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-4)


def test_products_of_whole_numbers():
  weight = filled(OUTPUT, {'format': 'int8', 'activations': 'int8'})
  random = np.random.default_rng(2)
  x = random.normal(size=(2, 3, 4, 8)).astype(np.float32)
  dy = random.normal(size=(2, 3, 6)).astype(np.float32)
  largest = np.abs(x).max((2, 3), keepdims=True) / np.float32(127)
  whole = np.round(x / largest).astype(np.int64)
  sums = np.einsum('blhk,hke->ble', whole, np.asarray(weight.packed[...], np.int64))
  expected = sums * largest[:, :, 0] * np.asarray(weight.scale[...]).reshape(-1)

  def both(w):
    y, back = jax.vjp(lambda x: w.multiply(x, ('batch', 'length', 'embed')), jnp.asarray(x))
    return y, back(jnp.asarray(dy))[0]

  y, dx = called(weight, both)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  # The gradient is that of the product with the matrix, as if x had not been rounded.
  straight = np.einsum('ble,hke->blhk', dy, by_hand(weight))
  np.testing.assert_allclose(dx, straight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('knobs', 'says'),
  [
    ({'format': 'int9'}, 'format: no format of numbers'),
    ({'format': 'nf4', 'offsets': True}, 'nf4 has no offsets'),
    ({'format': 'int8', 'activations': 'int4'}, "activations: 'int4' is not supported"),
    ({'format': 'int8', 'activations': 'int8', 'group': 4}, 'summed over all inputs'),
    ({'format': 'int4', 'group': 0}, '0 is not a size'),
  ],
)
def test_knobs_that_do_not_go_together_are_told(knobs, says):
  with pytest.raises(Invalid, match=says):
    Quantised(OUTPUT, **knobs, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(
  ('knobs', 'says'),
  [
    ({'format': 9}, "format: no format of numbers 'int9'"),
    ({'activations': 'int9'}, "activations: no format of numbers 'int9'"),
    ({'format': 'nf4', 'offsets': True}, 'offsets: nf4 has no offsets'),
  ],
)
def test_aware_training_knows_the_same_formats(knobs, says):
  with pytest.raises(Invalid, match=says):
    StraightThrough(OUTPUT, **knobs, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize('file', ['int8', 'w8a8', 'int4', 'nf4', 'fp8'])
def test_nothing_is_left_of_the_format_before(file):
  """A quantised model is quantised again: its gin is read first, and the new file over it."""

  def tree(*names: str) -> str:
    files = [f'gin/quantisation/{name}.gin' for name in names]
    return str(configs.load(['gin/models/llama/tiny.gin', *files], root='MODEL').tree())

  assert tree('int4', 'w8a8', file) == tree('w8a8', 'int4', file) == tree(file)


def test_an_odd_matrix_does_not_go_into_halves_of_bytes():
  odd = Matrix((5, 4), ('embed', 'mlp'), nnx.initializers.normal(1.0))
  with pytest.raises(Invalid, match='packs 2 numbers in a byte, and a matrix has 5 inputs'):
    Quantised(odd, format='int4', rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize('family', ['mixtral', pytest.param('t5', marks=pytest.mark.slow)])
def test_counts_are_of_the_model_and_bytes_of_what_is_stored(family):
  plain = tiny(family)
  lengths = {'inputs': 8, 'targets': 8}
  before = counts.count(plain, lengths)
  assert before.stored_bytes == 4 * before.params_total
  model = functools.partial(plain, weight=functools.partial(Quantised, format='int4', group=8))
  after = counts.count(model, lengths)
  assert dataclasses.replace(after, stored_bytes=before.stored_bytes) == before
  module = counts.abstract(model)
  matrices = [m for _, m in nnx.iter_modules(module) if isinstance(m, Quantised)]
  numbers = sum(2 * np.prod(m.packed.shape) for m in matrices)
  # Half a byte and an eighth of a scale.
  assert after.stored_bytes == before.stored_bytes - numbers * 4 + numbers * (0.5 + 4 / 8)
  halved = counts.count(functools.partial(plain, weight=BFloat16), lengths)
  assert halved.stored_bytes == before.stored_bytes - 2 * numbers


def test_what_is_quantised_does_not_learn_and_lora_learns_beside_it():
  base = functools.partial(Quantised, format='nf4', group=8)
  model = functools.partial(tiny('llama'), weight=base)
  with pytest.raises(Invalid, match='is stored as uint8 and cannot learn'):
    learning.frozen_names(counts.abstract(model), None)
  model = functools.partial(model, weight=functools.partial(lora.LoRA, rank=2, base=base))
  module = counts.abstract(model)
  frozen = learning.frozen_names(module, ('.*/lora_[ab]',))
  assert any(name.endswith('kernel/base/packed') for name in frozen)


@pytest.mark.slow
def test_lora_and_its_quantised_base_become_one_matrix():
  base = functools.partial(Quantised, format='nf4', group=8)
  lora_model = functools.partial(lora.LoRA, rank=2, base=base)
  model = functools.partial(tiny('llama'), weight=lora_model)
  state = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=0)))))
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state)
  plain, whole = merge.merged(model, params)
  stack, merged_stack = params['stack']['sublayers'][0], whole['stack']['sublayers'][0]
  kernel = stack['parts'][0]['query']['kernel']
  shape = merged_stack['parts'][0]['query']['kernel'].shape
  assert kernel['base']['packed'].shape[0] == shape[0] == 2
  assert not merge.has_weights(plain)


@pytest.mark.parametrize('knobs', [{'format': 4}, {'format': 3, 'group': 8, 'activations': 4}])
def test_the_gradient_is_that_of_the_surrogate(knobs):
  """Finite differences of w -> f(w + constant): the rounding is a constant, and its own slope is not there."""
  weight = filled(OUTPUT, knobs, StraightThrough)
  x = np.random.default_rng(2).normal(size=(2, 3, 4, 8)).astype(np.float32)
  base = np.asarray(weight.base[...])
  graphdef = nnx.graphdef(weight)

  def loss(base, x):
    y = nnx.merge(graphdef, {'base': base}).multiply(x, ('batch', 'length', 'embed'))
    return jnp.sum(jnp.sin(y))

  offset = np.asarray(called(weight, lambda w: w[...]), np.float64) - base
  inputs = np.asarray(x, np.float64)
  if 'activations' in knobs:
    form = weight.of_inputs
    inputs = np.asarray(form.round_trip(np.asarray(x), (2, 3)), np.float64)

  def surrogate(base, shift):
    return np.sum(np.sin(np.einsum('blhk,hke->ble', inputs + shift, base + offset)))

  by_base, by_x = jit(jax.grad(loss, (0, 1)))(base, x)
  step, base = 1e-5, np.asarray(base, np.float64)
  random = np.random.default_rng(0)
  for gradient, of_base in ((by_base, True), (by_x, False)):
    for _ in range(5):
      way = random.normal(size=gradient.shape)
      up = surrogate(base + step * way, 0) if of_base else surrogate(base, step * way)
      down = surrogate(base - step * way, 0) if of_base else surrogate(base, -step * way)
      slope = (up - down) / (2 * step)
      np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-3, atol=1e-3)
