"""Cross-entropy that never holds the logits of a whole batch."""

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

  The length is cut into `chunks`, each of every so many-th token so that all devices have part in all of them;
  logits exist for one chunk at a time, and its gradient is taken on the way, so that the backward pass has no
  logits to compute again.

  Args:
    head: features [batch, length, embed] to logits [batch, length, vocab]; may close over parameters.
    x: [batch, length, embed].
    targets: [batch, length] integers.
    weights: [batch, length].
    chunks: divides length, or what a device has of it.
  """

  def sums(head_consts, x, targets, weights):
    nll, z = token_losses(head_fn(x, *head_consts), targets, z_loss)
    nll, z = jnp.sum(nll * weights), jnp.sum(z * weights)
    return nll + z, (nll, z)

  if x.shape[1] % chunks:
    raise ValueError(f'{chunks} chunks do not divide the length {x.shape[1]}')
  split = lambda a: jnp.moveaxis(
    a.reshape(a.shape[0], -1, chunks, *a.shape[2:], out_sharding=_where(a, chunked=True)), 2, 0
  )
  # Traced at a chunk's shape: gradients that the head defines itself keep the shape they were traced at.
  head_fn, consts = jax.closure_convert(head, x if chunks == 1 else split(x)[0])
  if chunks == 1:
    return sums(consts, x, targets, weights)[1]
  join = lambda a, like: jnp.moveaxis(a, 0, 2).reshape(like.shape, out_sharding=_where(like))

  dtypes = [c.dtype for c in consts], x.dtype

  @jax.custom_vjp
  def total(consts, x):
    def body(carry, chunk):
      _, parts = sums(consts, *chunk)
      return jax.tree.map(jnp.add, carry, parts), None

    zero = (jnp.zeros(()), jnp.zeros(()))
    return jax.lax.scan(body, zero, (split(x), split(targets), split(weights)))[0]

  def forward(consts, x):
    def body(carry, chunk):
      parts, d_consts = carry
      gradient = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)
      (_, new), (dc, dx) = gradient(consts, *chunk)
      return jax.tree.map(jnp.add, (parts, d_consts), (new, dc)), dx

    zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(_no_gradient, consts))
    (parts, d_consts), dx = jax.lax.scan(body, zero, (split(x), split(targets), split(weights)))
    like = lambda d, dtype: d.astype(dtype)
    return parts, (jax.tree.map(like, d_consts, dtypes[0]), join(dx, x))

  def backward(residuals, cotangents):
    # Both sums are differentiated as one: training always adds them with equal weight.
    g = cotangents[0]
    return jax.tree.map(lambda d, dtype: _scaled(d, g, dtype), residuals, dtypes)

  total.defvjp(forward, backward)
  return total(consts, x)


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
