"""Cross-entropy in chunks is cross-entropy, and both are its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.model.embedder import Embedder
from research.model.heads import TiedHead, UntiedHead
from research.parallel.axes import shard
from research.parallel.mesh import Mesh
from research.training.cross_entropy import (
  choose_chunks,
  cross_entropy,
  default_chunks,
  log_probabilities,
  token_losses,
)

# Quick to compile.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
BATCH, LENGTH, EMBED, VOCAB = 8, 12, 16, 40


def arrays():
  x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, EMBED))
  targets = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, VOCAB)
  weights = jax.random.bernoulli(jax.random.key(3), 0.7, (BATCH, LENGTH)).astype(jnp.float32)
  return x, targets, weights


def loss_and_gradients(tied: bool, z_loss: float, chunks: int):
  """((nll, z), gradients of their sum / 3 by x and by the parameters), on the mesh in use."""

  def make(key):
    rngs = nnx.Rngs(params=key)
    embedder = Embedder(EMBED, VOCAB, init=nnx.initializers.normal(0.5), rngs=rngs)
    return embedder, (TiedHead if tied else UntiedHead)(EMBED, VOCAB, rngs=rngs)

  graphdef = nnx.graphdef(jax.eval_shape(make, jax.random.key(0)))
  params = jit(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(jax.random.key(0))
  x, targets, weights = arrays()
  x = shard(x, 'batch', None, None)
  targets, weights = shard(targets, 'batch', None), shard(weights, 'batch', None)

  def total(params, x):
    embedder, head = nnx.merge(graphdef, params)
    matrix = head.weights(embedder, x.dtype)
    sums = cross_entropy(
      lambda x: head(x, matrix), x, targets, weights, z_loss=z_loss, chunks=chunks
    )
    return sum(sums) / 3, sums  # scaled: a cotangent that is not 1

  (_, sums), grads = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, x)
  matrix = lambda params: params[0]['tokens'].T if tied else params[1]['kernel']
  return jax.device_get((matrix(params), sums, grads[1], matrix(grads[0])))


def reference(matrix, z_loss):
  """The same by definition, in float64."""
  x, targets, weights = (np.asarray(a) for a in arrays())
  x, matrix = x.astype(np.float64), matrix.astype(np.float64)
  logits = x @ matrix
  log_z = np.log(np.exp(logits).sum(-1))
  p, hit = np.exp(logits - log_z[..., None]), np.eye(VOCAB)[targets]
  nll, z = weights * (log_z - (logits * hit).sum(-1)), weights * z_loss * log_z**2
  d_logits = weights[..., None] * (p - hit + 2 * z_loss * log_z[..., None] * p) / 3
  return (nll.sum(), z.sum()), d_logits @ matrix.T, np.einsum('ble,blv->ev', x, d_logits)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('chunks', [1, 4])
@pytest.mark.parametrize(('tied', 'z_loss'), [(True, 0.0), (False, 1e-2)])
def test_cross_entropy_is_its_definition(sizes, chunks, tied, z_loss):
  devices = jax.devices()[: np.prod(sizes)]
  with Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]).use(devices):
    matrix, *got = loss_and_gradients(tied, z_loss, chunks)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference(matrix, z_loss)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max() + 1e-30)


def test_chunks_that_do_not_divide_the_length_are_refused():
  x, targets, weights = arrays()
  with pytest.raises(ValueError, match='5 chunks do not divide the length 12'):
    cross_entropy(lambda x: x, x, targets, weights, chunks=5)


def test_default_chunks_are_the_fewest_that_fit_and_divide():
  assert default_chunks(8, 512, 32000) == 8
  assert default_chunks(32, 128, 512) == 1
  assert default_chunks(1, 7, 100, limit=200) == 7  # 4 would do, and does not divide 7


def test_one_cpu_takes_larger_chunks():
  with Mesh().use(jax.devices()[:1]):
    assert choose_chunks(8, 512, 32000) == 1
    assert choose_chunks(8, 4096, 32000) == 8
  with Mesh(data=2).use(jax.devices()[:2]):
    assert choose_chunks(8, 512, 32000) == 4  # of the four rows of a device


def test_a_target_outside_the_vocabulary_is_no_nan():
  # A token without weight may have any number.
  logits = jax.random.normal(jax.random.key(0), (3, VOCAB))
  targets = jnp.array([4, -1, VOCAB])

  def total(logits):
    return jnp.sum(token_losses(logits, targets, 0.0)[0] * jnp.array([1.0, 0.0, 0.0]))

  value, gradient = jax.value_and_grad(total)(logits)
  np.testing.assert_allclose(value, -jax.nn.log_softmax(logits[0])[4], rtol=1e-6)
  np.testing.assert_allclose(
    gradient[0], jax.nn.softmax(logits[0]) - jax.nn.one_hot(4, VOCAB), atol=1e-6
  )
  assert not gradient[1:].any()


def checkpointed(loss):
  return jax.checkpoint(loss)


def scanned(loss):
  def total(matrix, *arrays):
    return jax.lax.scan(lambda sum, a: (sum + loss(matrix, *a), None), 0.0, arrays)[0]

  # The arrays of each round of the loop are halves of the batch.
  return lambda matrix, *arrays: total(matrix, *(a.reshape(2, -1, *a.shape[1:]) for a in arrays))


@pytest.mark.parametrize('around', [jax.jit, checkpointed, scanned])
@pytest.mark.parametrize('chunks', [1, 3])
@pytest.mark.parametrize('of', ['cross_entropy', 'log_probabilities'])
def test_the_gradient_passes_through_a_transformation_around_the_loss(around, chunks, of):
  x, targets, weights = arrays()
  matrix = jax.random.normal(jax.random.key(4), (EMBED, VOCAB))

  def loss(matrix, x, targets, weights):
    head = lambda x: x @ matrix
    if of == 'cross_entropy':
      return cross_entropy(head, x, targets, weights, chunks=chunks)[0]
    return -jnp.sum(weights * log_probabilities(head, x, targets, chunks=chunks))

  def defined(matrix):
    log_p = jax.nn.log_softmax(x @ matrix)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])

  with Mesh(data=1).use(jax.devices()[:1]):
    got = jit(jax.grad(around(loss)))(matrix, x, targets, weights)
    want = jit(jax.grad(defined))(matrix)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * jnp.abs(want).max())


@pytest.mark.parametrize('chunks', [1, 3])
def test_the_arrays_beside_the_logits_have_no_gradient(chunks):
  x, targets, weights = arrays()

  def loss(weights):
    return cross_entropy(
      lambda x: x @ jnp.ones((EMBED, VOCAB)), x, targets, weights, chunks=chunks
    )[0]

  assert not jit(jax.grad(loss))(weights).any()
