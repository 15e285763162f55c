"""The product of attention. Its backward pass computes the weights again instead of storing them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.divisors import largest_divisor
from research.parallel.axes import on_one_cpu, spec, spec_of
from research.parallel.mesh import platform

# The logit of a key that the query may not see, and a lower bound of the maximum of a row. A row that sees no
# key then has exp(HIDDEN - FLOOR) = 0 everywhere: its result and its gradient are zero and not NaN.
HIDDEN = -1e30
FLOOR = -1e29

# In training one CPU computes the product for as many rows of the batch at once as have this many logits, 4 MB:
# what one operation writes is still in the cache when the next one reads it (experiments/speed/README.md).
LOGITS_AT_ONCE = 2**20


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  scale: float,
  soft_cap: float | None = None,
  causal: bool = False,
) -> jax.Array:
  """softmax(scale query key^T + bias, where mask) value, with the softmax in float32.

  The weights are normalised after their product with the values. The backward pass computes them again from the
  logarithm of their sum (Dao et al. 2022, arXiv:2205.14135, appendix B.2) and stores no [query, key].

  Args:
    query: [batch, query, heads, head_dim].
    key: [batch, key, kv_heads, head_dim]; heads is a multiple of kv_heads, and query head h reads key head
      h // (heads // kv_heads).
    value: [batch, key, kv_heads, head_dim of value].
    mask: bool, [batch or 1, 1, query, key].
    bias: [batch or 1, heads, query, key].
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c) (Gemma 2).
    causal: the mask hides every later key, so these need not be computed.

  Returns:
    [batch, query, heads, head_dim of value]. A query that sees no key (padding) gets zeros.
  """
  length, kv_heads = query.shape[1], key.shape[2]
  query, sharding = grouped(query, kv_heads)
  mask = None if mask is None else mask[:, :, :, None]
  if bias is not None:
    bias_shape = (bias.shape[0], kv_heads, query.shape[3], *bias.shape[2:])
    batch_axis = None if bias.shape[0] == 1 else 'batch'
    to = spec(batch_axis, 'kv_heads', None, 'length', None, shape=bias_shape)
    bias = jnp.swapaxes(bias.reshape(bias_shape, out_sharding=to), 2, 3)
  product = functools.partial(_product, scale, soft_cap)
  blocks = []
  for start, stop in _query_blocks(length, causal and sharding[1] is None):
    keys = stop if causal and key.shape[1] == length else key.shape[1]
    block = functools.partial(_block, start=start, stop=stop, keys=keys)
    blocks.append(
      product(query[:, start:stop], key[:, :keys], value[:, :keys], block(mask), block(bias))
    )
  return ungrouped(blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1))


def _block(x: jax.Array | None, start: int, stop: int, keys: int) -> jax.Array | None:
  """Cuts a mask or a bias [batch, kv_heads, query or 1, group, key] to some queries and the first keys."""
  if x is None:
    return None
  rows = x if x.shape[2] == 1 else x[:, :, start:stop]
  return rows[..., :keys]


def grouped(query: jax.Array, kv_heads: int) -> tuple[jax.Array, jax.P]:
  """Groups queries by the key head that they read.

  Both 'kv_heads' and 'heads' are split over one mesh axis. If it does not divide kv_heads, keys stay whole.

  Args:
    query: [batch, length, heads, head_dim].
    kv_heads: the number of key heads.

  Returns:
    [batch, length, kv_heads, group, head_dim], and its sharding.
  """
  batch, length, heads, head_dim = query.shape
  shape = (batch, length, kv_heads, heads // kv_heads, head_dim)
  sharding = spec('batch', 'length', 'kv_heads', None, None, shape=shape)
  return query.reshape(shape, out_sharding=sharding), sharding


def ungrouped(y: jax.Array) -> jax.Array:
  """Undoes `grouped`: [batch, length, kv_heads, group, head_dim] to [batch, length, heads, head_dim]."""
  shape = (*y.shape[:2], y.shape[2] * y.shape[3], y.shape[4])
  return y.reshape(shape, out_sharding=spec('batch', 'length', 'heads', None, shape=shape))


def _query_blocks(length: int, causal: bool) -> list[tuple[int, int]]:
  """Returns (start, stop) of blocks of queries.

  There are two halves if the first half of the queries does not see the second half of the keys: a quarter less
  work. More blocks would save up to a half, but each is compiled by itself, and its matrices are small.
  """
  half = length // 2
  return [(0, half), (half, length)] if causal and half >= 32 else [(0, length)]


def logits(scale, soft_cap, query, key, mask, bias):
  """Returns the logits after the soft cap, bias and mask, and those after the soft cap alone.

  Both are float32 [batch, kv_heads, query, group, key]. XLA's product of q and k has this order of axes, so
  nothing is transposed. A CPU would transpose the keys, which are the second operand. That is little beside the
  product with many queries, but as much as the product with one: then the keys come first.
  """
  query = query * scale
  if query.shape[1] == 1 and platform() == 'cpu':
    s = jnp.einsum('bskd,bqkgd->bksqg', key, query, preferred_element_type=jnp.float32)
    s = jnp.moveaxis(s, 2, -1)
  else:
    s = jnp.einsum('bqkgd,bskd->bkqgs', query, key, preferred_element_type=jnp.float32)
  if soft_cap is not None:
    s = soft_cap * jnp.tanh(s / soft_cap)
  capped = s
  if bias is not None:
    s = s + bias
  return (s if mask is None else jnp.where(mask, s, HIDDEN)), capped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(scale, soft_cap, query, key, value, mask, bias):
  """Returns [batch, query, kv_heads, group, head_dim]; mask and bias broadcast against `logits`."""
  return _forward_of_rows(scale, soft_cap, query, key, value, mask, bias)[0]


def _forward(scale, soft_cap, *inputs):
  of_rows = functools.partial(_forward_of_rows, scale, soft_cap)
  y, log_total = _by_rows(of_rows, inputs, _rows_at_once(*inputs[:2]))
  return y, (*inputs, y, log_total)


def _forward_of_rows(scale, soft_cap, query, key, value, mask, bias):
  """Returns the product and the logarithm of the sum of every query's weights."""
  # Less the maximum of its row, exp cannot overflow.
  s, _ = logits(scale, soft_cap, query, key, mask, bias)
  top = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), FLOOR)
  weights = jnp.exp(s - top)
  total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
  y = jnp.einsum(
    'bkqgs,bskd->bkqgd', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  y = jnp.swapaxes((y / total).astype(value.dtype), 1, 2)
  return y, top + jnp.log(total)


def _backward(scale, soft_cap, residuals, dy):
  query, key, bias = residuals[0], residuals[1], residuals[4]
  of_rows = functools.partial(_backward_of_rows, scale, soft_cap)
  *gradients, d_bias = _by_rows(
    of_rows,
    (*residuals, dy),
    _rows_at_once(query, key),
    sum_last=bias is not None and len(bias) == 1,
  )
  return *gradients, None, None if bias is None else d_bias.astype(bias.dtype)


def _backward_of_rows(scale, soft_cap, query, key, value, mask, bias, y, log_total, dy):
  """Returns the gradients by query, key, value and bias; the last in float32, or None."""
  s, capped = logits(scale, soft_cap, query, key, mask, bias)
  weights = jnp.exp(s - log_total)
  # d logits = weights (d weights - sum of weights d weights), and that sum is dy . y.
  mean = _row_products(dy.astype(jnp.float32), y)
  ds = jnp.einsum('bqkgd,bskd->bkqgs', dy, value, preferred_element_type=jnp.float32)
  ds = weights * (ds - jnp.swapaxes(mean, 1, 2))
  d_bias = None
  if bias is not None:
    d_bias = ds if bias.shape[0] != 1 else _sum_over_batch(ds)
  if soft_cap is not None:
    ds = ds * (1 - jnp.square(capped / soft_cap))
  weights, ds = weights.astype(dy.dtype), ds.astype(query.dtype)

  def dot(letters, a, b, like):
    return jnp.einsum(letters, a, b, out_sharding=spec_of(like))

  if on_one_cpu():
    # Or XLA moves the transposition of the result into the product, where it transposes ds, which is larger.
    d_query = jax.lax.optimization_barrier(jnp.einsum('bkqgs,bskd->bkqgd', ds, key))
    d_query = jnp.swapaxes(d_query, 1, 2) * scale
  else:
    d_query = dot('bkqgs,bskd->bqkgd', ds, key, query) * scale
  d_key = dot('bkqgs,bqkgd->bskd', ds, query * scale, key)
  d_value = dot('bkqgs,bqkgd->bskd', weights, dy, value)
  return d_query, d_key, d_value, d_bias


_product.defvjp(_forward, _backward)


def _rows_at_once(query: jax.Array, key: jax.Array) -> int:
  """Returns how many rows of the batch are computed at once: a divisor of the batch, or all of it."""
  batch, queries, kv_heads, group, _ = query.shape
  of_row = queries * kv_heads * group * key.shape[1]
  if not on_one_cpu() or not batch * of_row:
    return batch
  rows = largest_divisor(batch, max(1, LOGITS_AT_ONCE // of_row))
  # Many small operations would take longer than few that do not fit into the cache.
  return rows if rows * of_row >= LOGITS_AT_ONCE // 2 else batch


def _by_rows(f: Callable, arrays: tuple, rows: int, *, sum_last: bool = False) -> tuple:
  """Applies f to `rows` rows of the batch at a time.

  Args:
    f: maps the rows of arrays to a tuple of arrays, the last of which may be None.
    arrays: [batch or 1, ...] or None. The first has the whole batch.
    rows: divides the batch.
    sum_last: the last result is [1, ...], and is summed over all calls.

  Returns:
    The results of f for the whole batch.
  """
  batch = len(arrays[0])
  if rows == batch:
    return f(*arrays)
  cut = [x is not None and len(x) == batch for x in arrays]

  def step(total, parts):
    results = f(*(part if whole else x for part, x, whole in zip(parts, arrays, cut, strict=True)))
    if not sum_last:
      return total, results
    return total + results[-1], results[:-1]

  parts = [
    x.reshape(-1, rows, *x.shape[1:]) if whole else None
    for x, whole in zip(arrays, cut, strict=True)
  ]
  shape = jax.eval_shape(f, *arrays)[-1]
  total = jnp.zeros(shape.shape, shape.dtype) if sum_last else None
  total, results = jax.lax.scan(step, total, parts)
  results = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)
  return (*results, total) if sum_last else results


# XLA on a CPU is slow to sum over the first axis, and to multiply and sum in one operation: 73 ms for the batch
# of T5's gradients and 8 ms for the products of rows, where products of matrices take 1 ms
# (experiments/speed/README.md). Other chips would round the factors of such products to bfloat16.


def _sum_over_batch(x: jax.Array) -> jax.Array:
  """Returns the sum over the first axis, which stays, with one entry."""
  if on_one_cpu():
    return jnp.einsum('b,b...->...', jnp.ones(x.shape[0], x.dtype), x)[None]
  return jnp.sum(x, axis=0, keepdims=True)


def _row_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns sum(x * y) over the last axis, which stays, with one entry."""
  if on_one_cpu():
    return jnp.einsum('...d,...d->...', x, y)[..., None]
  return jnp.sum(x * y, axis=-1, keepdims=True)
