"""Matrix products of consecutive groups of rows, each group with its own matrix."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
  """Returns y[r] = x[r] w[g] for every row r of group g. Rows after the last group are unspecified.

  On accelerators this is `jax.lax.ragged_dot`. On a CPU that would multiply every row with every matrix, so
  there a loop goes over the blocks of every group, and the cost is proportional to the rows.

  Args:
    x: [rows, inputs]; rows is a multiple of block.
    w: [groups, inputs, outputs].
    sizes: [groups] integers, each a multiple of block, their sum at most rows.
    block: rows per step of the loop, static.
  """
  return jax.lax.platform_dependent(
    x, w, sizes,
    cpu=functools.partial(_blocks, block=block, transpose=False),
    default=_ragged,
  )  # fmt: skip


def _ragged(x, w, sizes):
  if w.shape[0] > 1:
    return jax.lax.ragged_dot(x, w, sizes)
  # XLA's TPU backend fails to lower a ragged_dot of a single group (one expert per device).
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
  """Returns the first block of every group, and the block after its last one."""
  end = jnp.cumsum(sizes) // block
  return end - sizes // block, end


def _rows(x, i, block):
  return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _dot(a, b, contract):
  """Returns the product of a and b in float32, contracted over axis contract[0] of a and contract[1] of b."""
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _blocks(x, w, sizes, *, block, transpose):
  """`grouped_matmul` by a loop over blocks; `transpose` multiplies with the transposed matrices."""
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
  """Returns x^T dy over the rows of every group, [groups, inputs, outputs]."""
  first, last = _bounds(sizes, block)

  def group(g, dw):
    def step(i, total):
      return total + _dot(_rows(x, i, block), _rows(dy, i, block), (0, 0))

    total = jnp.zeros(dw.shape[1:], jnp.float32)
    total = jax.lax.fori_loop(first[g], last[g], step, total)
    return dw.at[g].set(total.astype(dw.dtype))

  dw = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype)
  return jax.lax.fori_loop(0, sizes.shape[0], group, dw)
