"""Matrix products of consecutive groups of rows, each with a matrix of its own."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
  """y[r] = x[r] w[g] for the rows r of group g; what the rows after the last group get is unspecified.

  Args:
    x: [rows, inputs]; rows is a multiple of block.
    w: [groups, inputs, outputs].
    sizes: [groups] integers, each a multiple of block, their sum at most rows.
    block: the step, static.

  On accelerators this is `jax.lax.ragged_dot`. On a CPU that would multiply every row with every matrix, so
  there each group's blocks are walked one by one, which costs what its rows cost.
  """
  return jax.lax.platform_dependent(
    x, w, sizes,
    cpu=functools.partial(_blocks, block=block, transpose=False),
    default=_ragged,
  )  # fmt: skip


def _ragged(x, w, sizes):
  if w.shape[0] > 1:
    return jax.lax.ragged_dot(x, w, sizes)
  # XLA's TPU backend fails to lower a ragged_dot of a single group, which one expert a device is.
  mine = jnp.arange(x.shape[0])[:, None] < sizes[0]
  return jnp.where(mine, x, 0) @ w[0]


def _forward(x, w, sizes, block):
  return grouped_matmul(x, w, sizes, block), (x, w, sizes)


def _backward(block, residuals, dy):
  def cpu(x, w, sizes, dy):
    return _blocks(dy, w, sizes, block=block, transpose=True), _outer(x, dy, sizes, block)

  def default(x, w, sizes, dy):
    return jax.vjp(lambda x, w: _ragged(x, w, sizes), x, w)[1](dy)

  dx, dw = jax.lax.platform_dependent(*residuals, dy, cpu=cpu, default=default)
  return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)


def _bounds(sizes, block):
  end = jnp.cumsum(sizes) // block
  return end - sizes // block, end


def _rows(x, i, block):
  return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _dot(a, b, contract):
  """a b in float32, contracted over these axes."""
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _blocks(x, w, sizes, *, block, transpose):
  first, last = _bounds(sizes, block)

  def group(g, y):
    matrix = w[g]

    def step(i, y):
      rows = _dot(_rows(x, i, block), matrix, (1, 1 if transpose else 0)).astype(y.dtype)
      return jax.lax.dynamic_update_slice_in_dim(y, rows, i * block, 0)

    return jax.lax.fori_loop(first[g], last[g], step, y)

  y = jnp.zeros((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)
  return jax.lax.fori_loop(0, w.shape[0], group, y)


def _outer(x, dy, sizes, block):
  """[groups, inputs, outputs]: x^T dy over the rows of each group."""
  first, last = _bounds(sizes, block)

  def group(g, dw):
    step = lambda i, total: total + _dot(_rows(x, i, block), _rows(dy, i, block), (0, 0))
    total = jnp.zeros(dw.shape[1:], jnp.float32)
    total = jax.lax.fori_loop(first[g], last[g], step, total)
    return dw.at[g].set(total.astype(dw.dtype))

  dw = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype)
  return jax.lax.fori_loop(0, sizes.shape[0], group, dw)
