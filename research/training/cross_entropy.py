"""Cross-entropy, and other functions of logits, without the logits of a whole batch in memory.

With a vocabulary of 32,000 the logits are the largest array of a small model's step. Here they exist for a
chunk of the length at a time. One CPU takes up to 512 MB of them in one chunk (`LOGITS_ON_ONE_CPU`), since that
is faster; `Run.logits_chunks` asks for more chunks where memory is short.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.divisors import largest_divisor
from research.parallel.axes import axis_size, on_each, on_one_cpu

# The most logits of a chunk. After each chunk the gradient of the table of vectors is added up, which takes a
# CPU longer than larger logits (experiments/speed/README.md).
LOGITS = 2**24
LOGITS_ON_ONE_CPU = 2**27


def token_losses(
  logits: jax.Array, targets: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the negative log-likelihood and the z-loss of every token.

  The z-loss is z_loss * log(Z)^2 (PaLM, arXiv:2204.02311, section 5).

  Args:
    logits: [..., vocab] float32. The vocabulary may be sharded.
    targets: [...] integers.
    z_loss: weight of log(Z)^2.

  Returns:
    Two arrays [...], in nats.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  target_logit = _at_targets(logits, targets)
  return log_z - target_logit, z_loss * log_z**2


@jax.custom_jvp
def _at_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the logit of every target, [...], of logits [..., vocab]."""
  if on_one_cpu():
    return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode='clip')[..., 0]
  return _masked_sum(logits, targets)


@_at_targets.defjvp
def _change_at_targets(values, changes):
  # The transpose of a masked sum is a choice, which is made where the gradient of the logits is made. That of a
  # gather would be a second array of the size of the logits.
  return _at_targets(*values), _masked_sum(changes[0], values[1])


def _masked_sum(logits: jax.Array, targets: jax.Array) -> jax.Array:
  # Not a gather, which would bring all logits to every device where the vocabulary is sharded.
  hit = jax.lax.broadcasted_iota(jnp.int32, (1,) * targets.ndim + logits.shape[-1:], targets.ndim)
  return jnp.sum(jnp.where(hit == targets[..., None], logits, 0.0), axis=-1)


def cross_entropy(
  head: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Returns the sums over all tokens of weight times negative log-likelihood, and of weight times z-loss.

  Args:
    head: as for `sum_over_tokens`.
    x: as for `sum_over_tokens`.
    targets: [batch, length] integers.
    weights: [batch, length].
    z_loss: weight of log(Z)^2.
    chunks: as for `sum_over_tokens`.
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
  """Sums a function of the logits over all tokens, without the logits of the whole batch.

  The length is cut into `chunks`. Chunk i has tokens i, i + chunks, i + 2 chunks, ..., so that every device has
  tokens of every chunk. Logits exist for one chunk at a time. The forward pass takes the chunk's gradient as
  well, so the backward pass computes no logits again.

  Args:
    head: maps features [batch, length, embed] to logits [batch, length, vocab]; may close over parameters.
    sums: maps (logits, *arrays) of one chunk to (terms, counts), tuples of scalars. The terms are minimised
      together and are differentiated as one sum. The counts have no gradient.
    x: the features, [batch, length, embed].
    *arrays: [batch, length, ...]. They have no gradient.
    chunks: must divide the length, or the part of it that a device has.

  Returns:
    (terms, counts), each summed over the chunks.

  Raises:
    ValueError: `chunks` does not divide the length.
  """

  def of_chunk(head_consts, x, *arrays):
    terms, counts = sums(head_fn(x, *head_consts), *arrays)
    return functools.reduce(operator.add, terms), (terms, counts)

  if x.shape[1] % chunks:
    raise ValueError(f'{chunks} chunks do not divide the length {x.shape[1]}')
  arrays = jax.lax.stop_gradient(arrays)  # in one piece, too
  split = functools.partial(_split, chunks=chunks)
  # A custom_vjp cannot differentiate by what its function closes over, and cannot read it if a jax.jit or a
  # scan around it is differentiated. So the head's parameters become arguments, and the arrays too. The head is
  # traced at a chunk's shape: gradients that it defines itself keep the shape they were traced at.
  head_fn, consts = jax.closure_convert(head, x if chunks == 1 else split(x)[0])
  if chunks == 1:
    return of_chunk(consts, x, *arrays)[1]

  dtypes = [c.dtype for c in consts], x.dtype

  def zeros(consts, x, arrays):
    def of_first(consts, *chunks):
      first = (a[0] for a in chunks)
      return of_chunk(consts, *first)[1]

    shapes = jax.eval_shape(of_first, consts, split(x), *map(split, arrays))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  @jax.custom_vjp
  def total(consts, x, arrays):
    def body(carry, chunk):
      _, parts = of_chunk(consts, *chunk)
      return jax.tree.map(jnp.add, carry, parts), None

    return jax.lax.scan(body, zeros(consts, x, arrays), (split(x), *map(split, arrays)))[0]

  def forward(consts, x, arrays):
    def body(carry, chunk):
      parts, d_consts = carry
      gradient = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)
      (_, new), (dc, dx) = gradient(consts, *chunk)
      return jax.tree.map(jnp.add, (parts, d_consts), (new, dc)), dx

    def cast(gradient, dtype):
      return gradient.astype(dtype)

    zero = (zeros(consts, x, arrays), jax.tree.map(_no_gradient, consts))
    (parts, d_consts), dx = jax.lax.scan(body, zero, (split(x), *map(split, arrays)))
    return parts, (jax.tree.map(cast, d_consts, dtypes[0]), _join(dx, x))

  def backward(residuals, cotangents):
    # Training adds the terms with equal weight, so all terms have the same cotangent.
    factor = cotangents[0][0]

    def scaled(gradient, dtype):
      return _scaled(gradient, factor, dtype)

    return *jax.tree.map(scaled, residuals, dtypes), None

  total.defvjp(forward, backward)
  return total(consts, x, arrays)


def log_probabilities(
  head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, *, chunks: int = 1
) -> jax.Array:
  """Returns the log-probability of every target, float32 [batch, length], in nats.

  Logits exist for one chunk at a time. The backward pass computes them again, chunk by chunk: it needs the
  cotangent of every token, which the forward pass does not know.

  Args:
    head: as for `sum_over_tokens`.
    x: as for `sum_over_tokens`.
    targets: [batch, length] integers.
    chunks: as for `sum_over_tokens`.
  """
  if chunks == 1:
    return -token_losses(head(x), targets, 0.0)[0]
  split = functools.partial(_split, chunks=chunks)
  head_fn, consts = jax.closure_convert(head, split(x)[0])

  @jax.custom_vjp
  def of_all(consts, x, targets):
    def of_chunk(chunk):
      return -token_losses(head_fn(chunk[0], *consts), chunk[1], 0.0)[0]

    return _join(jax.lax.map(of_chunk, (split(x), split(targets))), targets)

  def backward(residuals, cotangent):
    # The gradient of sum(cotangent * log p) is that of a cross-entropy with weights -cotangent.
    *inputs, targets = residuals

    def weighted(consts, x):
      def head_of_chunk(chunk):
        return head_fn(chunk, *consts)

      return cross_entropy(head_of_chunk, x, targets, -cotangent, chunks=chunks)[0]

    return *jax.grad(weighted, argnums=(0, 1))(*inputs), None

  def forward(*inputs):
    return of_all(*inputs), inputs

  of_all.defvjp(forward, backward)
  return of_all(consts, x, targets)


def _split(a: jax.Array, chunks: int) -> jax.Array:
  """[batch, length, ...] as [chunks, batch, length / chunks, ...]."""
  cut = a.reshape(a.shape[0], -1, chunks, *a.shape[2:], out_sharding=_where(a, chunked=True))
  return jnp.moveaxis(cut, 2, 0)


def _join(a: jax.Array, like: jax.Array) -> jax.Array:
  """Undoes `_split`: returns an array of the shape of `like`."""
  return jnp.moveaxis(a, 0, 2).reshape(like.shape, out_sharding=_where(like))


def _where(x: jax.Array, chunked: bool = False):
  """Returns the sharding of x [batch, length, ...], or None outside any mesh.

  With `chunked`, returns that of x as [batch, length / chunks, chunks, ...].
  """
  sharding = jax.typeof(x).sharding
  if sharding.mesh.empty:
    return None
  spec = (*sharding.spec, *[None] * x.ndim)[: x.ndim]
  return jax.P(*spec[:2], None, *spec[2:]) if chunked else jax.P(*spec)


def _no_gradient(x: jax.Array) -> jax.Array:
  """Returns zeros with the sharding of the gradient of `x`.

  Where every device has a copy of `x`, its gradient is not yet summed over the devices. The zeros are in
  float32 at least, since the gradients of many chunks are added to them.
  """
  where = jax.typeof(x).to_ct_aval().sharding
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.zeros(x.shape, dtype, out_sharding=None if where.mesh.empty else where)


def _scaled(gradient: jax.Array, factor: jax.Array, dtype) -> jax.Array:
  # jax multiplies an array that is not yet summed over mesh axes only by one that is marked as reduced over
  # them.
  axes = jax.typeof(gradient).sharding.spec.unreduced
  factor = jax.sharding.reshard(factor, jax.P(reduced=axes)) if axes else factor
  return (factor * gradient).astype(dtype)


def choose_chunks(rows: int, length: int, vocab: int) -> int:
  """Returns how many parts the length is cut into for the logits of a step if the run does not say."""
  # The limit is on the logits of one device. Every chunk has an equal part of every device's share of the
  # length.
  rows = on_each(rows, 'batch')
  parts = axis_size('sequence')
  limit = LOGITS_ON_ONE_CPU if on_one_cpu() else LOGITS
  return default_chunks(
    rows * parts // axis_size('length'), length // parts, on_each(vocab, 'vocab'), limit
  )


def default_chunks(batch: int, length: int, vocab: int, limit: int = LOGITS) -> int:
  """Returns the fewest chunks that divide the length and have at most `limit` logits each."""
  of_chunk = largest_divisor(length, max(1, limit // max(1, batch * vocab)))
  return length // of_chunk
