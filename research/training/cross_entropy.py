"""Cross-entropy that never holds the logits of a whole batch."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_losses(
  logits: jax.Array, targets: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood in nats, and z_loss * log(Z)^2 (PaLM, arXiv:2204.02311, section 5), per token.

  Args:
    logits: [..., vocab] float32, vocab may be sharded.
    targets: [...] integers.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A masked sum and not a gather: a gather over a sharded vocabulary would collect the logits.
  hit = jax.lax.broadcasted_iota(jnp.int32, (1,) * targets.ndim + logits.shape[-1:], targets.ndim)
  target_logit = jnp.sum(jnp.where(hit == targets[..., None], logits, 0.0), axis=-1)
  return log_z - target_logit, z_loss * log_z**2


def cross_entropy(
  head: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums over all tokens of the negative log-likelihood and of the z-loss.

  Args:
    head, x, chunks: as of `sum_over_tokens`.
    targets: [batch, length] integers.
    weights: [batch, length].
  """

  def sums(logits, targets, weights):
    nll, z = token_losses(logits, targets, z_loss)
    return (jnp.sum(nll * weights), jnp.sum(z * weights)), ()

  return sum_over_tokens(head, sums, x, targets, weights, chunks=chunks)[0]


def sum_over_tokens(
  head: Callable[[jax.Array], jax.Array],
  sums: Callable[..., tuple[tuple, tuple]],
  x: jax.Array,
  *arrays: jax.Array,
  chunks: int = 1,
) -> tuple[tuple, tuple]:
  """Sums over all tokens of what logits cost, without the logits of the whole batch.

  The length is cut into `chunks`, each of every so many-th token so that all devices have part in all of them;
  logits exist for one chunk at a time, and its gradient is taken on the way, so that the backward pass has no
  logits to compute again.

  Args:
    head: features [batch, length, embed] to logits [batch, length, vocab]; may close over parameters.
    sums: (logits, *arrays), each of one chunk, to (terms, counts), tuples of scalars. The terms are minimised
      together and are differentiated as one; the counts have no gradient.
    x: [batch, length, embed].
    *arrays: [batch, length, ...], which have no gradient.
    chunks: divides length, or what a device has of it.
  """

  def of_chunk(head_consts, x, *arrays):
    terms, counts = sums(head_fn(x, *head_consts), *arrays)
    return functools.reduce(operator.add, terms), (terms, counts)

  if x.shape[1] % chunks:
    raise ValueError(f'{chunks} chunks do not divide the length {x.shape[1]}')
  split = functools.partial(_split, chunks=chunks)
  # Traced at a chunk's shape: gradients that the head defines itself keep the shape they were traced at.
  head_fn, consts = jax.closure_convert(head, x if chunks == 1 else split(x)[0])
  if chunks == 1:
    return of_chunk(consts, x, *arrays)[1]

  dtypes = [c.dtype for c in consts], x.dtype

  def zeros(consts, x):
    of_first = lambda consts, *chunk: of_chunk(consts, *(a[0] for a in chunk))[1]
    shapes = jax.eval_shape(of_first, consts, split(x), *map(split, arrays))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  @jax.custom_vjp
  def total(consts, x):
    def body(carry, chunk):
      _, parts = of_chunk(consts, *chunk)
      return jax.tree.map(jnp.add, carry, parts), None

    return jax.lax.scan(body, zeros(consts, x), (split(x), *map(split, arrays)))[0]

  def forward(consts, x):
    def body(carry, chunk):
      parts, d_consts = carry
      gradient = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)
      (_, new), (dc, dx) = gradient(consts, *chunk)
      return jax.tree.map(jnp.add, (parts, d_consts), (new, dc)), dx

    zero = (zeros(consts, x), jax.tree.map(_no_gradient, consts))
    (parts, d_consts), dx = jax.lax.scan(body, zero, (split(x), *map(split, arrays)))
    like = lambda d, dtype: d.astype(dtype)
    return parts, (jax.tree.map(like, d_consts, dtypes[0]), _join(dx, x))

  def backward(residuals, cotangents):
    # The terms are differentiated as one: training always adds them with equal weight.
    g = cotangents[0][0]
    return jax.tree.map(lambda d, dtype: _scaled(d, g, dtype), residuals, dtypes)

  total.defvjp(forward, backward)
  return total(consts, x)


def log_probabilities(
  head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, *, chunks: int = 1
) -> jax.Array:
  """The log-probability of every target, float32 [batch, length].

  Logits exist for one chunk at a time, in the backward pass too, which computes them again.

  Args:
    head, x, chunks: as of `sum_over_tokens`.
    targets: [batch, length] integers.
  """
  if chunks == 1:
    return -token_losses(head(x), targets, 0.0)[0]
  split = functools.partial(_split, chunks=chunks)
  head_fn, consts = jax.closure_convert(head, split(x)[0])

  @jax.custom_vjp
  def of_all(consts, x):
    def of_chunk(chunk):
      return -token_losses(head_fn(chunk[0], *consts), chunk[1], 0.0)[0]

    return _join(jax.lax.map(of_chunk, (split(x), split(targets))), targets)

  def backward(residuals, cotangent):
    # d(sum of cotangent x log p): a cross-entropy of these weights.
    def weighted(consts, x):
      def head_of_chunk(chunk):
        return head_fn(chunk, *consts)

      return cross_entropy(head_of_chunk, x, targets, -cotangent, chunks=chunks)[0]

    return jax.grad(weighted, argnums=(0, 1))(*residuals)

  of_all.defvjp(lambda consts, x: (of_all(consts, x), (consts, x)), backward)
  return of_all(consts, x)


def _split(a: jax.Array, chunks: int) -> jax.Array:
  """[batch, length, ...] as [chunks, batch, length / chunks, ...]."""
  cut = a.reshape(a.shape[0], -1, chunks, *a.shape[2:], out_sharding=_where(a, chunked=True))
  return jnp.moveaxis(cut, 2, 0)


def _join(a: jax.Array, like: jax.Array) -> jax.Array:
  """What `_split` cut, in the shape of `like`."""
  return jnp.moveaxis(a, 0, 2).reshape(like.shape, out_sharding=_where(like))


def _where(x: jax.Array, chunked: bool = False):
  """Where [batch, length, ...] lives, or [batch, length / chunks, chunks, ...]; None outside any mesh."""
  sharding = jax.typeof(x).sharding
  if sharding.mesh.empty:
    return None
  spec = (*sharding.spec, *[None] * x.ndim)[: x.ndim]
  return jax.P(*spec[:2], None, *spec[2:]) if chunked else jax.P(*spec)


def _no_gradient(x: jax.Array) -> jax.Array:
  """Zeros where the gradient of `x` lives: not summed over the devices, where `x` is gathered to them.

  In float32, whatever `x` is: the gradients of many chunks are added up.
  """
  where = jax.typeof(x).to_ct_aval().sharding
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.zeros(x.shape, dtype, out_sharding=None if where.mesh.empty else where)


def _scaled(gradient: jax.Array, factor: jax.Array, dtype) -> jax.Array:
  axes = jax.typeof(gradient).sharding.spec.unreduced
  factor = jax.sharding.reshard(factor, jax.P(reduced=axes)) if axes else factor
  return (factor * gradient).astype(dtype)


def default_chunks(batch: int, length: int, vocab: int, limit: int = 2**24) -> int:
  """The fewest chunks that divide the length with at most `limit` logits in each."""
  fits = (
    n for n in range(1, length + 1) if length % n == 0 and batch * length * vocab <= n * limit
  )
  return next(fits, length)
