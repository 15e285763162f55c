"""Attention by the TPU kernels of `tile_kernels.py`, of arrays as the model has them, with its gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.model.kernels import distance, tile_kernels
from research.model.kernels.tiles import At, Operands, Tiles

LANES = 128  # lengths of tiles are multiples of this


class Sight(NamedTuple):
  """What queries see beside causality and a window. Any may be None.

  Attributes:
    segments: [batch, queries]; a query sees its own segment.
    key_segments: [batch, keys]; both or neither.
    prefix: bool, [batch, queries]; two tokens of a prefix see each other in spite of causality.
    bias: [heads, queries + keys - 1]: entry queries - 1 + d is for keys d places after the query.
  """

  segments: jax.Array | None = None
  key_segments: jax.Array | None = None
  prefix: jax.Array | None = None
  bias: jax.Array | None = None


def tiled_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  sight: Sight,
  *,
  scale: float,
  soft_cap: float | None = None,
  causal: bool,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """softmax(scale query key^T + bias) value on one device, without [query, key] in memory.

  Args:
    query: [batch, queries, heads, head_dim].
    key: [batch, keys, kv_heads, head_dim].
    value: [batch, keys, kv_heads, head_dim of value].
    sight: what the queries see.
    scale: the factor of the logits.
    soft_cap: c in c tanh(logits / c).
    causal: no token sees a later one.
    window: no token sees one that is `window` or more places away.
    interpret: runs the kernel in Python, for tests.

  Returns:
    [batch, queries, heads, head_dim of value]. A query that sees no key (padding) gets zeros.
  """
  queries, keys = query.shape[1], key.shape[1]
  block = block_of(queries, keys)
  plan = Tiles(block, keys, causal, sight.prefix is not None, window, soft_cap, interpret)
  marks = marks_of(sight)
  if marks is not None:
    marks = tuple(padded(x, block, axis=1) for x in marks)
  query, key, value = (padded(heads_first(x), block, axis=2) for x in (query * scale, key, value))
  windows = None
  if sight.bias is not None:
    windows = distance.windows(sight.bias, queries, keys, block)
  y = _attend(plan, query, key, value, windows, marks)
  return heads_first(y[:, :, :queries])


def block_of(queries: int, keys: int, most: int = 512) -> int:
  """Returns the size of tiles: the largest, up to `most`, that needs no more padding than the smallest."""
  whole = [-(-length // LANES) * LANES for length in (queries, keys)]
  return next(
    size for size in (most, 512, 256, LANES) if not any(length % size for length in whole)
  )


def padded(x: jax.Array, block: int, axis: int) -> jax.Array:
  """Returns x with zeros at the end, so that `block` divides its size."""
  more = -x.shape[axis] % block
  return x if not more else jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def heads_first(x: jax.Array) -> jax.Array:
  """Swaps length and heads: the kernels have [batch, heads, length, ...]."""
  return jnp.swapaxes(x, 1, 2)


def marks_of(sight: Sight) -> tuple[jax.Array, jax.Array] | None:
  """Returns `Operands`' marks of queries and keys, [batch, length] each, or None."""
  if sight.segments is None and sight.prefix is None:
    return None
  sides = (sight.segments, sight.key_segments)
  return tuple(mark(segments, sight.prefix) for segments in sides)


def mark(segments: jax.Array | None, prefix: jax.Array | None) -> jax.Array:
  """Returns the marks of tokens: twice the segment, plus 1 in a prefix."""
  marks = 0 if segments is None else 2 * segments.astype(jnp.int32)
  return marks if prefix is None else marks + prefix.astype(jnp.int32)


def operands_of(query, key, value, windows, marks) -> Operands:
  """Returns what the kernels read; marks [batch, length] of queries and keys, or None."""
  marks = (None, None) if marks is None else (marks[0][:, None], marks[1][:, :, None])
  return Operands(query, key, value, *marks, windows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, windows, marks):
  operands = operands_of(query, key, value, windows, marks)
  return tile_kernels.forward(plan, operands, At(), value.dtype)[0]


def _forward(plan, query, key, value, windows, marks):
  learns = windows is not None and windows.perturbed
  arrays = jax.tree.map(value_of, (query, key, value, windows, marks), is_leaf=is_primal)
  y, log_total = tile_kernels.forward(plan, operands_of(*arrays), At(), arrays[2].dtype)
  # A residual is an array, so whether the bias learns is said by the tree: () or None.
  return y, (*arrays, y, log_total, () if learns else None)


def _backward(plan, residuals, dy):
  *arrays, y, log_total, learns = residuals
  query, key, _, windows, _ = arrays
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    dy = jnp.zeros(y.shape, y.dtype)
  operands = operands_of(*arrays)
  saved = (dy, log_total, mean_of(y, dy))
  dq, d_windows = tile_kernels.backward_query(
    plan, operands, At(), saved, query.dtype, d_bias=learns is not None
  )
  dk, dv = tile_kernels.backward_keys(plan, operands, At(), saved, key.dtype)
  if windows is not None and d_windows is None:
    d_windows = jnp.zeros_like(windows)
  return dq, dk, dv, d_windows, None


def is_primal(x):
  return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def value_of(x):
  return x.value


def mean_of(y: jax.Array, dy: jax.Array) -> jax.Array:
  """Returns the sums over head_dim of y dy, [batch, heads, 1, queries], in float32."""
  return jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)[:, :, None]


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
